from mmd2v.data.draws import lazy_uniforms, uniforms


def test_lazy_uniforms_are_the_uniforms():
    for seed in range(50):
        key = ("crop and flip", seed, 3, f"sampl\u00e9-{seed}")
        assert list(lazy_uniforms(23, *key)) == uniforms(23, *key).tolist()
