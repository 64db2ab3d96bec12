"""`mmd2v data check`: is everything in some shards readable?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

_LOCAL_HELP = "A folder of .tar files; a path with {000..007} braces or wildcards; a .txt list of these; one or more."


@dataclass(frozen=True)
class Check:
    """Read and decode everything in some shards; exit status 1 when something is wrong."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_LOCAL_HELP)]
    show: int = 20
    """Problems to print."""

    def run(self) -> int:
        """Check and print counts and problems."""
        from mmd2v.data.check import check_shards

        report = check_shards(self.shards)
        for problem in report.problems[: self.show]:
            print(problem)
        if report.problem_count > (shown := len(report.problems[: self.show])):
            print(f"… and {report.problem_count - shown:,} more")
        print(report)
        return 1 if report.problem_count else 0
