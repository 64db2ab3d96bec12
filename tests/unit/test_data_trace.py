import json

from mmd2v.data.trace import Trace, cut_other_traces


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_forgets_what_it_had_written_from_there_on(tmp_path):
    trace = Trace(tmp_path / "deep" / "trace", 2, 0)
    for step in range(5):
        trace.write(step, 0, ["ä", "b"])
    trace.close()
    path = tmp_path / "deep" / "trace.rank2.jsonl"
    with open(path, "a") as handle:
        handle.write('{"step": 5, "mic')  # the process was killed here
    again = Trace(tmp_path / "deep" / "trace", 2, 3)
    assert steps(path) == [0, 1, 2]
    again.write(3, 1, ["c"])
    again.close()
    assert steps(path) == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "micro_step": 1, "ids": ["c"]}


def test_files_of_ranks_that_are_no_more_are_cut_too(tmp_path):
    for name, ranks in (("trace", 12), ("trace2", 2)):
        for rank in range(ranks):
            trace = Trace(tmp_path / name, rank, 0)
            for step in range(4):
                trace.write(step, 0, ["a"])
            trace.close()
    (tmp_path / "trace.rankx.jsonl").write_text("not ours\n")
    cut_other_traces(tmp_path / "trace", 2, 1)
    assert [steps(tmp_path / f"trace.rank{rank}.jsonl") for rank in range(12)] == [[0, 1, 2, 3]] + 11 * [[0, 1]]
    assert steps(tmp_path / "trace2.rank1.jsonl") == [0, 1, 2, 3]
    assert (tmp_path / "trace.rankx.jsonl").read_text() == "not ours\n"
    cut_other_traces(tmp_path / "absent" / "trace", 2, 1)
