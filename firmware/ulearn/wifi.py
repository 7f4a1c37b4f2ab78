# A board in a fleet over a network, whose host it asks for tasks:
#
#   ulearn.wifi.join("fleet.json", model, samples)      # until the job is done
#
#   fleet = ulearn.wifi.Fleet("fleet.json", model, samples)
#   while fleet.poll():                                 # inside a loop of your own
#       ...
#
# The network must be up; MicroPython brings a Wi-Fi connection back by itself. fleet.json is what the host made for
# this board (`ulearn federate`, over USB): address, certificate, and the secret that every letter is signed with.
import json
import os
import struct
import time
from binascii import a2b_base64, unhexlify

import ulearn.letter as letter
import ulearn.task as tasks

from .compat import collect, const
from .hmac import MAC_BYTES
from .post import Post
from .update import HEADER_BYTES, payload_bytes
from .wire import Refused, Wire

_PATIENCE_S = const(25)  # how long a poll may be kept
_CLOSE_MS = const(5000)  # who has to wait longer gives the connection back
_FIRST_MS = const(250)  # after a failure; it doubles
_LONGEST_MS = const(10000)
_TEXT_BYTES = const(160)
_LONGEST_PAUSE_MS = const(3600000)
_SLACK_BYTES = const(1024)  # of a download, beyond every trainable number twice
_SLICE_MS = const(200)


class Fleet:
    # `samples`, `held_out`: what the board learns from and is tested on. progress(steps done, steps in all): called
    # after each training step, and as progress(0, 0) a few times a second while the board waits: the place to feed a
    # watchdog. say(text): told what happens. battery(): percent. `histogram`: let the host know how many samples of
    # each class there are. `silence_ms`: after so long without a byte a connection is given up.
    def __init__(
        self,
        card,
        model,
        samples,
        held_out=None,
        progress=None,
        say=None,
        battery=None,
        histogram=False,
        silence_ms=15000,
    ):
        card = read_card(card)
        self.model, self.samples, self.held_out = model, samples, held_out
        self.progress, self.battery, self.histogram = progress, battery, histogram
        self.say = say or _quiet
        self.done = False
        self.task = None  # being carried out
        self.trouble = ""  # why the last step failed
        wire = Wire(card["host"], card["port"], card["certificate"], card["name"], self._idle, silence_ms)
        largest = 2 * payload_bytes(model.tensors) + HEADER_BYTES + _SLACK_BYTES
        self._post = Post(wire, card["board"].encode(), card["secret"], largest)
        if not card["certificate"]:
            self.say("ulearn: no TLS: who listens reads everything that this board sends")
        self._due = time.ticks_ms()
        self._failures = 0
        self._step_us = self._link = 0  # measured
        self._drop()

    def poll(self, patience_s=0):
        # The next step, if it is time for one: ask, fetch, train, deliver. False: the job is done.
        # `patience_s`: how long the host may keep the question until it has a task.
        if self.done or self.wait_ms() > 0:
            return not self.done
        try:
            self._step(patience_s)
        except OSError as e:
            # A connection that has served may have ended while nobody used it, or the host was started again.
            self._failed(e, self._post.wire.served and not self._failures)
        except Refused as e:  # it is not signed, and may be anybody's: nothing is given up but the connection
            self._failed(e.args[1])
        except (ValueError, MemoryError) as e:  # a wrong certificate; a host that is newer than this board
            self._failed(e)
        return not self.done

    def wait_ms(self):
        # How long `poll` has nothing to do; not above 0: it has.
        return time.ticks_diff(self._due, time.ticks_ms())

    def rest(self):
        # Sleeps until there is something to do.
        left = self.wait_ms()
        while left > 0:
            time.sleep_ms(min(left, _SLICE_MS))
            self._idle()
            left = self.wait_ms()

    def close(self):
        self._post.wire.close()

    def _step(self, patience_s):
        task = self.task
        stale = task is not None and self.model.base_id != task.base_id
        if task is not None and not stale and not self._excuse and self._answer is None:
            self._work()  # whether the host is there or not
        elif not self._post.open:
            return self._post.hello()  # no success by itself
        elif task is None:
            self._ask(patience_s)
        elif self._excuse:
            self._excuse_itself()
        elif stale:
            self._fetch()
        else:
            self._deliver()
        self._failures = 0

    def _ask(self, patience_s):
        battery = self.battery() if self.battery else 255
        facts = tasks.facts(self.model, self.samples, self.held_out, self._step_us, self._link, battery, self.histogram)
        start = time.ticks_ms()
        self._post.send(letter.POLL, patience_s, facts)
        what, content = self._post.reply(letter.POLL, 1000 * min(patience_s, self._post.hold_s))
        if what == letter.REFUSED:
            self.trouble = str(content, "utf-8")
            self.say("ulearn: " + self.trouble)
            return self._pause(_LONGEST_MS)
        task = tasks.parse(content)
        if task.kind == tasks.DONE and task.base_id == self.model.base_id:
            self.done = True
            self.close()
            self.say("ulearn: the job is done")
        elif task.kind == tasks.WAIT:
            self._pause(task.retry_ms - time.ticks_diff(time.ticks_ms(), start))
        else:
            self._drop()
            self.task = task

    def _fetch(self):
        # The last base, or the rest of it.
        post, task = self._post, self.task
        post.send(letter.DOWN, 0, struct.pack(letter.WANTED, self.model.base_id, post.base, post.have))
        what, _ = post.reply(letter.DOWN)
        room, base = post.room, post.base
        post.forget()
        if what == letter.UPDATE:
            self._own(self.model.apply, room)
        elif what == letter.FULL:
            self._own(tasks.replace, self.model, room, base)
        if not self._excuse and (self.model.base_id != task.base_id or task.kind == tasks.DONE):
            self._drop()  # the host has gone on since it gave the task; it is asked again

    def _work(self):
        task = self.task
        collect()
        start = time.ticks_ms()
        self._answer = self._own(tasks.carry_out, self.model, self.samples, task, self.held_out, self.progress)
        if task.kind == tasks.TRAIN and self._answer is not None:
            steps = len(self.samples) * task.epochs
            self._step_us = max(1, time.ticks_diff(time.ticks_ms(), start) * 1000 // steps)

    def _own(self, do, *args):
        # The board's own part of a task. None where it fails, of which the host is told next.
        try:
            return do(*args)
        except (OSError, ValueError, MemoryError) as e:
            self._excuse = str(e) or "out of memory"
            self.say("ulearn: round %d: %s" % (self.task.round, self._excuse))

    def _excuse_itself(self):
        task = self.task
        text = self._excuse.encode()[:_TEXT_BYTES]
        self._post.send(letter.CANNOT, 0, text, task.nonce, task.job, task.round)
        self._post.reply(letter.CANNOT)
        self.trouble = self._excuse
        self._drop()
        self._pause(task.retry_ms)

    def _deliver(self):
        task, answer = self.task, self._answer
        offset = 0
        if self._tried:
            self._post.send(letter.WHERE, 0, b"", task.nonce, task.job, task.round, len(answer), len(answer))
            what, content = self._post.reply(letter.WHERE)
            if what != letter.PARTIAL:
                return self._judged(what, content)
            offset = min(struct.unpack(letter.PLACE, content)[0], len(answer))
        self._tried = True
        start = time.ticks_ms()
        self._post.send(letter.UP, 0, answer, task.nonce, task.job, task.round, offset)
        what, content = self._post.reply(letter.UP)
        self._link = (len(answer) - offset) * 1000 // max(1, time.ticks_diff(time.ticks_ms(), start))
        if what != letter.PARTIAL:
            self._judged(what, content)

    def _judged(self, what, content):
        text, task = str(content, "utf-8"), self.task
        self.say("ulearn: round %d: %s" % (task.round, text))
        self._drop()
        if what == letter.REFUSED:
            self.trouble = text
            self._pause(task.retry_ms)

    def _drop(self):
        self.task = self._answer = None
        self._excuse = ""  # why the task cannot be carried out
        self._tried = False  # a part of the answer may be at the host

    # When something goes wrong.

    def _failed(self, fault, at_once=False):
        self._post.wire.close()
        code = fault.args[0] if isinstance(fault, OSError) and fault.args else 0
        tls = isinstance(code, int) and code < -255  # of mbedTLS
        self.trouble = "TLS: error %d" % code if tls else str(fault) or "out of memory"
        wait = min(_FIRST_MS << min(self._failures, 10), _LONGEST_MS)
        self._failures += 1
        if at_once:
            return self._pause(0)
        self._pause(wait // 2 + wait * os.urandom(1)[0] // 512)  # many boards lose the same host at once
        self.say("ulearn: %s; trying again" % self.trouble)

    def _pause(self, ms):
        self._due = time.ticks_add(time.ticks_ms(), min(max(0, ms), _LONGEST_PAUSE_MS))
        if ms > _CLOSE_MS:
            self._post.wire.close()

    def _idle(self):
        if self.progress:
            self.progress(0, 0)


def join(card, model, samples, held_out=None, progress=None, say=print, **more):
    # Takes part until the job is done; see Fleet.
    fleet = Fleet(card, model, samples, held_out, progress, say, **more)
    try:
        while fleet.poll(_PATIENCE_S):
            fleet.rest()
    finally:
        fleet.close()


def read_card(card):
    # `card`: a path, or the file's bytes. Raises ValueError that says what is wrong with it.
    name = "card"
    if isinstance(card, str):
        name = card
        try:
            with open(card, "rb") as f:
                card = f.read()
        except OSError as e:
            raise ValueError("%s: %s; enrol this board on the host" % (name, e))
    try:
        card = json.loads(card)
        card["secret"] = unhexlify(card["secret"])
        card["certificate"] = a2b_base64(card["certificate"]) if card["certificate"] else None
        whole = len(card["secret"]) == MAC_BYTES and 1 <= len(card["board"].encode()) <= letter.BOARD_BYTES
        whole = whole and bool(card["host"]) and 0 < card["port"] < 65536 and bool(card["name"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError("%s: damaged; have the host write it anew" % name)
    if not card["certificate"] and not card.get("plain"):
        raise ValueError("%s: holds no certificate and does not allow plain text; have the host write it anew" % name)
    return card


def _quiet(text):
    pass
