"""The thread beside a rank's training: it hears where the other ranks are, judges, and ends the job of a lost one.

Only `time.monotonic` is used: setting the clock changes nothing. Time in which the thread itself did not run (the whole
job was suspended) is held against nobody.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mmd2v.distributed.environment import World
from mmd2v.distributed.finding_rank0 import Meeting
from mmd2v.distributed.heartline import Message
from mmd2v.distributed.processes import end_process, farewells
from mmd2v.distributed.switchboard import PARTING, Heard, Switchboard
from mmd2v.distributed.verdict import Left, RankState, judge, standstill

_TICK = 0.2  # seconds between two looks of the thread
_BEATS_A_SECOND = 256  # that rank 0 should not have to read more than, in a large job
_CONSEQUENCE = 3.0  # seconds a rank with a torn collective waits to hear who has torn it


class Watched(Protocol):
    """What the thread asks of the rank that it is part of."""

    def now_at(self) -> tuple[int, str, float]:
        """Step, phase and seconds in it."""

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint, None where there is none. Raises LookupError when that is not known yet."""


class Watch(threading.Thread):
    """Listens to the other ranks (rank 0) or to rank 0 (the others), and judges.

    Attributes:
        tells: whether this rank is the one that tells the user.
    """

    def __init__(
        self, own: Watched, world: World, timeout: float, host: str, meeting: Meeting, listener: socket.socket | None
    ) -> None:
        super().__init__(name="mmd2v-pulse", daemon=True)
        self.tells = world.is_main
        self._rank, self._world, self._timeout, self._host, self._meeting = own, world, timeout, host, meeting
        self._interval = min(max(0.5, world.size / _BEATS_A_SECOND), timeout / 4)
        self._switchboard = Switchboard(world.rank, world.size, meeting, listener, self._greeting)
        now = time.monotonic()
        self._own = RankState(world.rank, host, os.getpid(), now, now)
        self._states: dict[int, RankState] = {world.rank: self._own}
        self._farewell: Message | None = None
        self._warned = timeout

    def begin(self) -> str | None:
        """Start. Returns None, or why rank 0 cannot be reached: then nothing is watched."""
        try:
            hello = self._switchboard.connect()
        except OSError as error:
            return str(error)
        if hello is not None:
            self._welcome(hello)
        self.start()
        return None

    def leave(self, how: Left, error: str) -> None:
        """Say farewell and stop watching.

        With a torn collective wait for a moment first: who has torn it may be about to end this process.
        """
        self._farewell = self._say("bye", how=how, text=error)
        if self is not threading.current_thread():
            self.join(PARTING + 2 * _TICK + (_CONSEQUENCE if how is Left.TORN else 0) + 1)

    def run(self) -> None:
        """Watch until `leave`; the thread's own method."""
        try:
            self._run()
        except Exception:
            # A mistake of ours must not end a run that is well: go silent in an orderly way.
            traceback.print_exc()
            print("warning: the ranks' signs of life are no longer watched", file=sys.stderr, flush=True)
            self._switchboard.part(self._say("bye", how=Left.DONE))

    def _run(self) -> None:
        beaten, looked = 0.0, time.monotonic()
        stop_at: float | None = None
        while stop_at is None or time.monotonic() < stop_at:
            ready = self._switchboard.wait(_TICK)
            now = time.monotonic()
            if now - looked > 10 * _TICK:
                self._excuse(now - looked)
            looked = now
            for heard in self._switchboard.receive(ready, now):
                self._listen_to(heard, now)

            farewell = self._farewell
            if farewell is not None and stop_at is None:
                if farewell.how != Left.TORN:
                    break
                stop_at = now + _CONSEQUENCE
                self._own.left, self._own.left_at, self._own.error = Left.TORN, now, farewell.text
                self._switchboard.send(farewell)
            if stop_at is None and now - beaten >= self._interval:
                beaten = now
                self._switchboard.send(self._say("beat"))
            self._judge(now)
        assert self._farewell is not None
        self._switchboard.part(self._farewell)

    def _excuse(self, pause: float) -> None:
        """This thread did not run for so long: whatever was said meanwhile has yet to be heard."""
        for state in self._states.values():
            state.heard += pause

    def _listen_to(self, heard: Heard, now: float) -> None:
        if heard.hello is not None:
            self._welcome(heard.hello)
            self._hear(heard.rank, heard.messages, time.monotonic())
            return
        self._hear(heard.rank, heard.messages, now)
        state = self._states[heard.rank]
        if state.left in (Left.DONE, Left.RAISED) or heard.hung_up:
            if state.left is None:
                state.left, state.left_at = Left.LOST, now
            self._switchboard.hang_up(heard.rank)

    def _welcome(self, hello: Message) -> None:
        now = time.monotonic()
        state = RankState(hello.rank, hello.host, hello.pid, now, now - hello.seconds, hello.step, hello.phase)
        self._states[hello.rank] = state

    def _hear(self, rank: int, messages: list[Message], now: float) -> None:
        state = self._states[rank]
        for message in messages:
            if message.kind == "end":
                self._end_as_told(message.text)
            state.heard, state.since = now, now - message.seconds
            state.step, state.phase = message.step, message.phase
            if message.kind == "bye" and state.left is None:
                state.left_at, state.error = now, message.text
                try:
                    state.left = Left(message.how)
                except ValueError:
                    state.left = Left.LOST

    def _judge(self, now: float) -> None:
        own = self._own
        own.step, own.phase, seconds = self._rank.now_at()
        own.since, own.heard = now - seconds, now
        states = self._states.values()
        verdict = judge(states, now, self._timeout)
        if verdict is not None:
            self._end(verdict)
        if not self._world.is_main or own.left is not None:
            return
        doubt = standstill(states, now, self._warned)
        if doubt is not None:
            self._warned *= 2
            print(f"warning: {doubt}", file=sys.stderr, flush=True)
        elif standstill(states, now, self._timeout) is None:
            self._warned = self._timeout

    def _end(self, verdict: str) -> None:
        """End the whole job."""
        told = verdict + self._checkpoint()
        farewells.clear()  # the last word is another
        farewells.append(lambda _: self._switchboard.part(self._say("end", text=verdict)))
        end_process(told, tell=self.tells)

    def _end_as_told(self, verdict: str) -> None:
        """Another rank has come to a verdict and has told it, unless it is this rank's to tell the others."""
        if self._world.is_main:
            self._end(verdict)
        farewells.clear()
        farewells.append(lambda _: self._switchboard.close())
        end_process(verdict, tell=False)

    def _checkpoint(self) -> str:
        try:
            newest = self._rank.newest_checkpoint()
        except Exception:  # not known yet, or the training thread is changing what it reads
            return ""
        if newest is None:
            return "; there is no checkpoint"
        return f"; the newest checkpoint is {newest}; continue with --resume auto"

    def _say(self, kind: str, **more: Any) -> Message:
        step, phase, seconds = self._rank.now_at()
        return Message(kind, step=step, phase=phase[:200], seconds=seconds, **more)

    def _greeting(self) -> Message:
        plain = self._say("hello")
        return replace(plain, token=self._meeting.token, rank=self._world.rank, host=self._host[:200], pid=os.getpid())
