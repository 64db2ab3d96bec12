"""Whether a machine, or every node of a job, is fit to train on. `alone` looks at one, `node` at all that meet."""
