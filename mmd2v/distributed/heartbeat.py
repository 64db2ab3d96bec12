"""A rank that dies, freezes or fails alone ends the whole job, with a message that names it.

Without this, the other ranks wait in a collective operation until its time-out, which names nobody. Every rank has a
thread beside the training thread. That of rank 0 listens; those of the others keep a connection to it, on which both
sides say twice a second where they are. So it works under every launcher, and while the training thread is inside a
collective (which releases the interpreter): only a process that is stopped or gone falls silent.

Only `time.monotonic` is used: setting the clock changes nothing. Time in which the listening thread itself did not run
(the whole job was suspended) is held against nobody.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.distributed.environment import World
from mmd2v.distributed.heartline import Line, Message, is_greeting
from mmd2v.distributed.processes import end_process, farewells
from mmd2v.distributed.verdict import Left, RankState, judge, standstill

_TICK = 0.2  # seconds between two looks of the thread
_BEATS_A_SECOND = 256  # that rank 0 should not have to read more than, in a large job
_MEETING = 30.0  # seconds a rank tries to reach rank 0
_GREETING = 20.0  # seconds a stranger has to show that it belongs to the job
_PARTING = 1.0  # seconds to let a last word arrive
_CONSEQUENCE = 3.0  # seconds a rank with a torn collective waits to hear who has torn it
_MOST_STRANGERS = 4096


class _Meeting(NamedTuple):
    """How ranks find rank 0."""

    addresses: list[str]
    port: int
    token: str


class Pulse:
    """The signs of life of this rank. A context manager around all that a run does; every rank must enter it together.

    Attributes:
        newest: tells the newest checkpoint for the message, None where there is none; to be set by the run.
    """

    newest: Callable[[], Path | None] | None = None

    def __init__(self, world: World, timeout_s: float, *, peaceful: tuple[type[BaseException], ...] = ()) -> None:
        """With one rank nothing is ever sent.

        Args:
            world: the ranks.
            timeout_s: seconds without a word after which a rank counts as frozen.
            peaceful: exceptions with which a rank may leave like one that has finished.
        """
        self._world, self._peaceful = world, peaceful
        self._timeout = timeout_s
        self._place: tuple[int, str, float] = (0, "starting", time.monotonic())
        self._watch: _Watch | None = None

    def at(self, step: int, phase: str) -> None:
        """Note what this rank begins: a step, and a phase that fits behind "while", such as ``waiting for data``."""
        self._place = (step, phase, time.monotonic())

    def __enter__(self) -> Pulse:
        if self._world.size == 1:
            return self
        host = socket.gethostname()
        listener: socket.socket | None = None

        def meet_here() -> _Meeting:
            nonlocal listener
            listener = _listen(self._world.size)
            return _Meeting(_addresses(), listener.getsockname()[1], secrets.token_hex(16))

        meeting: _Meeting = from_main_rank(meet_here)
        watch = _Watch(self, self._world, self._timeout, host, meeting, listener)
        problem = watch.begin()
        found: list[tuple[str, str | None]] = gather_objects((host, problem))
        unheard = [f"rank {rank} (host {host}): {why}" for rank, (host, why) in enumerate(found) if why is not None]
        if unheard and self._world.is_main:
            print(
                f"warning: {len(unheard)} of {self._world.size} ranks cannot reach rank 0 at "
                f"{' or '.join(meeting.addresses)}, port {meeting.port}; should one of them be lost, only a time-out "
                f"ends the run. {unheard[0]}",
                file=sys.stderr,
                flush=True,
            )
        # When rank 0 is lost, one rank of each host says so.
        here = [rank for rank, (its, _) in enumerate(found) if its == host and rank != 0]
        watch.tells = self._world.rank in (0, min(here, default=0))
        if problem is None:
            self._watch = watch
            farewells.append(self._last_words)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        how = self._how(error)
        self._watch.leave(how, _first_line(error) if how is not Left.DONE and error is not None else "")
        with contextlib.suppress(ValueError):
            farewells.remove(self._last_words)

    def _how(self, error: BaseException | None) -> Left:
        if error is None or isinstance(error, self._peaceful):
            return Left.DONE
        if isinstance(error, SystemExit):
            return Left.RAISED if error.code else Left.DONE
        return Left.TORN if _is_torn(error) else Left.RAISED

    def _last_words(self, reason: str) -> None:
        """This process is about to end, for a reason of its own."""
        if self._watch is not None:
            self._watch.leave(Left.RAISED, reason)

    def now_at(self) -> tuple[int, str, float]:
        """Step, phase and seconds in it."""
        step, phase, since = self._place
        return step, phase, time.monotonic() - since


class _Watch(threading.Thread):
    """The thread: listens to the other ranks (rank 0) or to rank 0 (the others), and judges."""

    def __init__(
        self,
        pulse: Pulse,
        world: World,
        timeout: float,
        host: str,
        meeting: _Meeting,
        listener: socket.socket | None,
    ) -> None:
        super().__init__(name="mmd2v-pulse", daemon=True)
        self.tells = world.is_main
        self._pulse, self._world, self._timeout, self._host = pulse, world, timeout, host
        self._meeting, self._listener = meeting, listener
        self._interval = min(max(0.5, world.size / _BEATS_A_SECOND), timeout / 4)
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, Line] = {}
        self._strangers: dict[Line, float] = {}
        now = time.monotonic()
        self._own = RankState(world.rank, host, os.getpid(), now, now)
        self._states: dict[int, RankState] = {world.rank: self._own}
        self._farewell: Message | None = None
        self._warned = timeout
        _of_this_process.add(self)

    def begin(self) -> str | None:
        """Start. Returns None, or why rank 0 cannot be reached: then nothing is watched."""
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        else:
            try:
                line, hello = self._reach()
            except OSError as error:
                self.close_all()
                return str(error)
            self._welcome(line, hello)
        self.start()
        return None

    def leave(self, how: Left, error: str) -> None:
        """Say farewell and stop watching.

        With a torn collective wait for a moment first: who has torn it may be about to end this process.
        """
        self._farewell = self._say("bye", how=how, text=error)
        if self is not threading.current_thread():
            self.join(_PARTING + 2 * _TICK + (_CONSEQUENCE if how is Left.TORN else 0) + 1)

    def run(self) -> None:
        try:
            self._run()
        except Exception:
            # A mistake of ours must not end a run that is well: go silent in an orderly way.
            traceback.print_exc()
            print("warning: the ranks' signs of life are no longer watched", file=sys.stderr, flush=True)
            self._part(self._say("bye", how=Left.DONE))

    def _run(self) -> None:
        beaten, looked = 0.0, time.monotonic()
        stop_at: float | None = None
        while stop_at is None or time.monotonic() < stop_at:
            ready = self._selector.select(_TICK)
            now = time.monotonic()
            if now - looked > 10 * _TICK:
                self._excuse(now - looked)
            looked = now
            for key, _ in ready:
                self._attend(key.data, now)
            self._dismiss_strangers(now)

            farewell = self._farewell
            if farewell is not None and stop_at is None:
                if farewell.how != Left.TORN:
                    break
                stop_at = now + _CONSEQUENCE
                self._own.left, self._own.left_at, self._own.error = Left.TORN, now, farewell.text
                for line in self._lines.values():
                    line.send(farewell)
            if stop_at is None and now - beaten >= self._interval:
                beaten = now
                for line in self._lines.values():
                    line.send(self._say("beat"))
            self._judge(now)
        assert self._farewell is not None
        self._part(self._farewell)

    def _judge(self, now: float) -> None:
        own = self._own
        own.step, own.phase, seconds = self._pulse.now_at()
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
        farewells.append(lambda _: self._part(self._say("end", text=verdict)))
        end_process(told, tell=self.tells)

    def _checkpoint(self) -> str:
        if self._pulse.newest is None:
            return ""
        try:
            newest = self._pulse.newest()
        except Exception:  # the training thread may be changing what it reads
            return ""
        if newest is None:
            return "; there is no checkpoint"
        return f"; the newest checkpoint is {newest}; continue with --resume auto"

    def _attend(self, who: Line | int | None, now: float) -> None:
        """Somebody has something to say: a newcomer (None), a stranger (its line) or a rank."""
        if who is None:
            self._accept(now)
        elif isinstance(who, Line):
            self._examine(who)
        else:
            self._listen_to(who, now)

    def _accept(self, now: float) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no more descriptors
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            connection.close()
            return
        line = Line(connection)
        self._strangers[line] = now
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _examine(self, line: Line) -> None:
        messages = line.receive()
        if not messages and line.open:
            return
        self._selector.unregister(line.socket)
        del self._strangers[line]
        greeting = next(iter(messages), None)
        known = greeting is None or greeting.rank in self._states
        if greeting is None or known or not is_greeting(greeting, self._meeting.token, self._world.size):
            line.close()
            return
        line.send(self._greeting())
        self._welcome(line, greeting)
        self._hear(greeting.rank, messages[1:], time.monotonic())

    def _dismiss_strangers(self, now: float) -> None:
        for line in [line for line, since in self._strangers.items() if now - since > _GREETING]:
            self._selector.unregister(line.socket)
            del self._strangers[line]
            line.close()

    def _welcome(self, line: Line, hello: Message) -> None:
        now = time.monotonic()
        self._lines[hello.rank] = line
        state = RankState(hello.rank, hello.host, hello.pid, now, now - hello.seconds, hello.step, hello.phase)
        self._states[hello.rank] = state
        self._selector.register(line.socket, selectors.EVENT_READ, hello.rank)

    def _listen_to(self, rank: int, now: float) -> None:
        line = self._lines[rank]
        self._hear(rank, line.receive(), now)
        state = self._states[rank]
        if state.left in (Left.DONE, Left.RAISED) or not line.open:
            if state.left is None:
                state.left, state.left_at = Left.LOST, now
            self._selector.unregister(line.socket)
            del self._lines[rank]
            line.close()

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

    def _end_as_told(self, verdict: str) -> None:
        """Another rank has come to a verdict and has told it, unless it is this rank's to tell the others."""
        if self._world.is_main:
            self._end(verdict)
        farewells.clear()
        farewells.append(lambda _: self.close_all())
        end_process(verdict, tell=False)

    def _excuse(self, pause: float) -> None:
        """This thread did not run for so long: whatever was said meanwhile has yet to be heard."""
        for state in self._states.values():
            state.heard += pause

    def _say(self, kind: str, **more: Any) -> Message:
        step, phase, seconds = self._pulse.now_at()
        return Message(kind, step=step, phase=phase[:200], seconds=seconds, **more)

    def _greeting(self) -> Message:
        plain = self._say("hello")
        return replace(plain, token=self._meeting.token, rank=self._world.rank, host=self._host[:200], pid=os.getpid())

    def _reach(self) -> tuple[Line, Message]:
        """Connect to rank 0 and greet each other. Raises OSError when that cannot be done in time."""
        end, pause = time.monotonic() + _MEETING, 0.1
        while True:
            for address in self._meeting.addresses:
                try:
                    connection = socket.create_connection((address, self._meeting.port), timeout=5)
                    return self._greet(connection)
                except OSError as error:
                    problem = error
            if time.monotonic() > end:
                raise problem
            time.sleep(pause)
            pause = min(2.0, 2 * pause)

    def _greet(self, connection: socket.socket) -> tuple[Line, Message]:
        line = Line(connection)
        line.send(self._greeting())
        end = time.monotonic() + _GREETING
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            while line.open and (left := end - time.monotonic()) > 0:
                selector.select(left)
                for hello in line.receive():
                    if is_greeting(hello, self._meeting.token, self._world.size) and hello.rank == 0:
                        return line, hello
        line.close()
        raise OSError("who answers there is not rank 0 of this job")

    def _part(self, last: Message) -> None:
        """Say the last word and let it arrive: closing at once could take it back."""
        end = time.monotonic() + _PARTING
        for line in self._lines.values():
            line.send(last)
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_WR)
        if self._listener is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listener)
        while any(line.open for line in self._lines.values()) and (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                line = self._lines[key.data] if isinstance(key.data, int) else key.data
                line.receive()
                if not line.open:
                    self._selector.unregister(line.socket)
        self.close_all()

    def close_all(self) -> None:
        """Close every descriptor."""
        for line in (*self._lines.values(), *self._strangers):
            line.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()


_of_this_process: weakref.WeakSet[_Watch] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked loader process must not keep the connections open after the death of its rank."""
    for watch in _of_this_process:
        watch.close_all()
    farewells.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _listen(backlog: int) -> socket.socket:
    """A server on a port that the system chooses, for every address of this host."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # switched off
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True, reuse_port=False
            )
    return socket.create_server(("", 0), backlog=backlog)


def _addresses() -> list[str]:
    """Where other ranks may find this host, the likeliest first."""
    return list(dict.fromkeys(filter(None, (os.environ.get("MASTER_ADDR"), socket.gethostname()))))


def _first_line(error: BaseException) -> str:
    told = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


_TORN = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)


def _is_torn(error: BaseException) -> bool:
    """Whether an error is that of a collective operation, which another rank's end may have caused."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_TORN.search(str(error))))
