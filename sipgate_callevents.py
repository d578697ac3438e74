#!/usr/bin/env python3
# SPDX-License-Identifier: Unlicense
# Public domain, see https://unlicense.org
"""Receive the call events of sipgate.io: verify, decide, reply, keep, show.

Copy this one file to a server and start it; Python 3.8 or newer is all it needs:

    python3 sipgate_callevents.py               take calls; without WEBHOOK_URL (--url) for trials
    python3 sipgate_callevents.py simulate      rehearse a call, without a phone
    python3 sipgate_callevents.py check         find out why nothing arrives
    python3 sipgate_callevents.py calls         the latest calls, with their outcome
    python3 sipgate_callevents.py page          the same to look at, in a browser
    python3 sipgate_callevents.py forget N      remove a number from them

sipgate POSTs a newCall when a call starts. The XML reply decides about the call and asks
for the later events: answer, hangup, and dtmf (the digits of a <Gather>).

Part I answers the phone: everything that a waiting caller, or a byte from the internet, can reach
until the reply. Read it before you trust this file. Part II starts the program, prints events
after their reply, and looks at what is stored; no reply waits for it, but for event.call in a
function of yours, and for up to half a second while `forget` writes.

    socket bytes
      |  WebhookRequestHandler    a complete, strictly framed request, in time, within limits
      |  Receiver.admit           is_signed on the raw body, before the form in it is read;
      |                           then parse_event
      |  Receiver.reply_to        CallLog.record: on disk, or stderr says that it is not yet;
      |                           on_new_call, on_dtmf: your decision; response_xml
      |  one sendall
      +  Receiver.follow          afterwards: the printed line, on_answer and on_hangup

Threads: the main one accepts connections, makes room, and closes what is past its deadline.
One for each connection, which replies. One for each run of on_new_call or on_dtmf of yours.
Four Workers: call log, stdout, stderr, and one for on_answer and on_hangup.

What an administrator asks, and the docstring that answers it:

    who can invent events, and what a forged hangup does    Receiver.admit
    what a signature does not prove                         is_signed
    who sees numbers, and for how long                      CallLog
    what happens when the disk is full, slow, or hangs      CallLog
    how long a caller waits, and what enforces that         YourCode.decide, CallLog.record
    what a client can do that sends a byte a second         WebhookServer
    what happens on SIGTERM                                 serve, the last of Part I
    how to block a caller                                   on_new_call, below
    where to add an action, or an event                     Actions and XML, the comment at EVENTS

Time limits, and what happens then:

    a request, from its first byte to its last    10 s    closed, without a word
    its first byte, on a new connection           10 s    closed, without a word
    the reply, from the last byte of the body      3 s    the call goes through undecided
      of these, storing the event                  1 s    it waits in memory, stderr says so
      of these, waiting for one of 8 slots       0.5 s    the call goes through undecided
      of these, event.call in your function      0.2 s    it is None
    the client taking it, from that byte, too     10 s    closed
    between two requests of a connection          75 s    closed
    reading on after a malformed request           1 s    closed
    ending, to make room for another               1 s    closed
    stopping: replies, on_answer, on_hangup        4 s    given up; the call log has 1 s more,
                                                          stdout and stderr half a second each
    a run of your code                          no end    after 60 s (3 s while all slots are
                                                          taken) stderr and /healthz say so

The 3 s hold while Python runs: code of yours that never lets go of the interpreter (a regular
expression that takes minutes) stops every thread, and so every caller. With over 5,000 prints
that wait for stdout, or 1,000 events for on_answer and on_hangup, a new one is dropped.

Words: an *event* is one of sipgate's; the *response* is its XML document, the *reply* the
HTTP answer that carries it; a *handler* is http.server's class. A *call* is what a person
sees, a *leg* is what one callId names; *your functions* are the four below.

Not here: accounts, tunnels, certificates from Let's Encrypt, text to speech, CRM, mail.
"""
from __future__ import annotations  # this needs Python 3.8 or newer

import _thread
import argparse
import base64
import contextlib
import csv
import datetime
import difflib
import email.utils
import fnmatch
import functools
import glob
import hashlib
import hmac
import http.client
import http.server
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import re
import runpy
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.parse
import wave
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, TextIO

if sys.version_info < (3, 8):  # noqa: UP036 - for who has nothing newer
    sys.exit("sipgate_callevents needs Python 3.8 or newer; this is " + sys.version.split()[0])

__version__ = "2.0"

# Not by getLogger(): a dictConfig() in your code would switch it off.
logger = logging.Logger("sipgate_callevents", logging.INFO)  # noqa: LOG001


# ==========================================================================================
# What happens on a call                                                  *** edit here ***
# Your decisions. To keep this script replaceable, put any of the four functions into a file
# of your own and name it in CALL_HANDLERS.
# ==========================================================================================

def on_new_call(event: NewCallEvent) -> Action | None:
    """Say what happens to the call; None: what is configured at sipgate. 3 seconds at most.

    Outgoing calls come here, too. Numbers are digits with their country code, without +.
    """
    # if event.direction == "in" and event.from_number in ("anonymous", "49211555111"):
    #     return reject("busy")
    return None


def on_answer(event: AnswerEvent) -> None:
    """A call was answered. Runs after the reply, one at a time, and may be slow."""
    # print(event.user or event.answering_number, "is talking to", event.from_number)


def on_hangup(event: HangupEvent) -> None:
    """A leg ended. Runs after the reply, one at a time, and may be slow."""
    # if event.call and event.call.outcome == "missed":
    #     print("please ring back:", event.call.from_number)


def on_dtmf(event: DtmfEvent) -> Action | None:
    """Say what follows on the digits of a gather(); None: the call goes on. 3 seconds at most."""
    # if event.state == "language" and event.dtmf == "1":
    #     return dial("4915799912345")
    return None


# ==========================================================================================
# PART I: ANSWERS THE PHONE
# Each section uses only names from sections above it (your four functions excepted).
# ==========================================================================================

# ------------------------------------------------------------------------------------------
# Settings
# Checked values. They are read elsewhere.
# ------------------------------------------------------------------------------------------

# The paths below WEBHOOK_URL, and the event that each one is for.
ROUTES = {
    "/new-call": "newCall",
    "/on-answer": "answer",
    "/on-hangup": "hangup",
    "/on-data": "dtmf",
}


class SettingsError(Exception):
    """The program cannot start as it is set up; `args` holds one sentence for each fault."""


@functools.lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether `host` names this machine and no other: 127.0.0.0/8, ::1 or localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Settings:
    """The checked settings. The name of each in capitals is its name in `.env` and environment."""

    webhook_url: str = ""
    webhook_port: int = 8080
    webhook_host: str = "127.0.0.1"
    webhook_tls_cert: str = ""
    webhook_tls_key: str = ""
    verify_signature: str = "on"
    signature_key_file: str = ""
    call_handlers: str = ""
    call_log: str = "calls.db"
    call_log_days: int = 30
    call_output: str = "text"
    call_page_key: str = ""

    @property
    def trial(self) -> bool:
        """Whether there is no public address yet (trial mode)."""
        return not self.webhook_url

    @property
    def base_url(self) -> str:
        """What the routes are added to, for the URLs in a reply."""
        scheme = "https" if self.webhook_tls_cert else "http"
        return self.webhook_url or f"{scheme}://localhost:{self.webhook_port}"

    @property
    def base_path(self) -> str:
        """The path of WEBHOOK_URL, which the proxy hands on: "" or "/3f9c2a"."""
        return urllib.parse.urlsplit(self.webhook_url).path


# ------------------------------------------------------------------------------------------
# Signatures
# Whether sipgate signed these bytes. Knows nothing of HTTP and of events.
# ------------------------------------------------------------------------------------------

# DigestInfo of SHA-256 up to the digest (RFC 8017 9.2, note 1).
SHA256_PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")


class PublicKey(NamedTuple):
    """An RSA public key."""

    modulus: int
    exponent: int

    @property
    def size(self) -> int:
        """Length of the modulus, and so of a signature, in bytes."""
        return (self.modulus.bit_length() + 7) // 8


# One key for all customers; the same in sipgate's Node SDK and in its signature verifier.
SIPGATE_PUBLIC_KEY = """\
-----BEGIN PUBLIC KEY-----
MIICIjANBgkqhkiG9w0BAQEFAAOCAg8AMIICCgKCAgEAvFdlnqRfO5TmqzjtsFVC
qPz+oW+poi3lXQFvMJJMEAtlU4MbX+yuIkgnC+Qt3AQWIK+oWSEQiybg+p39wEMl
16PZxEzf9gONQvTg1XhyHnwqYUFQj/AoxPKGYC3jmdjZ224SrESiTN3CdxoOc3vk
cXiQstYE7SxnksPtzfk0aIOkicim5/tAP9izNQ18/zmX3ChjK2k72gf5dDlq+qZ8
pRiHAPZ64TySH6cLQDhaoh6Nbq8FEG3usXXPClbUMh2DZaTMPafpd+LNuTngJ/y+
KoZasVuFfXAeBqGA6l5d4Uedfr99Z6qjwDrJ8sU4z2Do9bJrbuqP+mOXEebhSI1K
vi8trEfrIt8hnDBGsBaB9NEO3kYxvDT2/PhC9fNYFocjEpZNd7/mUqTJDYlpa4UC
NDQaU+ATdXG8/P5sGAegks6MQTu+qe9XTO0CV48eswDkz6g3UbLOwmrJK59SjD3J
yAZ52sluwyDKRWw/PPTt8BTQLjvkdbiLUlc4ehJ4b1X7D7diYWHDPeFL47cAvaXh
dXVrZDeBJYibvD1jRx4ES0KlfhwzNXBYUoM/Movg9zMM2PzyHHKS//xIjwUC/FJ6
/6eykno0Hy2B1ev6s3hdY6VkN2zd7Wf+EK4DxRliwsg1U99szFE3ewLfexF+Uag5
M+TfPtOUumI/NHMTvsRW9+ECAwEAAQ==
-----END PUBLIC KEY-----
"""
_DER = base64.b64decode("".join(SIPGATE_PUBLIC_KEY.splitlines()[1:-1]))
# In the DER form of a key of this kind and size (RFC 3279 2.3.1), modulus and exponent lie here.
SIPGATE_KEY = PublicKey(int.from_bytes(_DER[33:545], "big"), int.from_bytes(_DER[547:550], "big"))


def decode_signature(header: str | None) -> bytes:
    """The bytes of an X-Sipgate-Signature; empty if it is not canonical base64 (RFC 4648 3.5)."""
    try:
        signature = base64.b64decode(header or "", validate=True)
    except ValueError:
        return b""
    return signature if base64.b64encode(signature).decode() == header else b""


def is_signed(body: bytes, header: str | None, keys: Sequence[PublicKey]) -> bool:
    """Whether `header` (an X-Sipgate-Signature) signs `body` with one of `keys`.

    It proves that sipgate (or who owns a key of SIGNATURE_KEY_FILE) signed this body for some
    customer: not for which, not when, nor for which path and query (event.state). A replayed
    newCall is decided again. So the path of WEBHOOK_URL is to be a secret.

    Total: any header gives True or False. RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 8.2.2): the
    one block that is right is built and compared whole, so that no parser can be misled.
    """
    signature = decode_signature(header)
    number = int.from_bytes(signature, "big")
    digest = SHA256_PREFIX + hashlib.sha256(body).digest()
    for key in keys:
        # Below the modulus: s + n has the same power as s and would be a second signature.
        if len(signature) == key.size and number < key.modulus:
            block = b"\x00\x01" + b"\xff" * (key.size - len(digest) - 3) + b"\x00" + digest
            if pow(number, key.exponent, key.modulus).to_bytes(key.size, "big") == block:
                return True
    return False


# ------------------------------------------------------------------------------------------
# Call events
# From the bytes of a webhook's body to a value. Knows no clock, no database and no socket.
# Wire names are turned into Python names here and nowhere else.
# ------------------------------------------------------------------------------------------

MAX_FIELDS = 1000  # of a form: a group of 200 users has 600. parse_qs takes long for 20,000


@dataclass(eq=False)
class WebhookError(Exception):
    """A request that is refused."""

    status: int
    reason: str  # a constant sentence for the reply
    detail: str = ""  # for stderr: more, and what to do


@dataclass(frozen=True)
class CallEvent:
    """What every event carries. What sipgate left out is "" or (); numbers and ids are text.

    `fields` is the form as it came: key to list of values. `body` and `signature` (None without)
    are what to pass on if another program is to verify it.
    """

    event: str = ""
    function: ClassVar[str] = ""  # the one of yours that gets it
    is_decided: ClassVar[bool] = True  # by what that function returns; else it runs later
    call_id: str = ""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False, hash=False)
    body: bytes = field(default=b"", repr=False, compare=False)
    signature: str | None = field(default=None, repr=False, compare=False)
    find_call: Callable[[CallEvent], Any] | None = field(default=None, repr=False, compare=False)

    def get(self, key: str, default: str = "") -> str:
        """The field under sipgate's name `key`, such as "from", as text; of a list the first."""
        return next(iter(self.fields.get(key, ())), default)

    @property
    def call(self) -> Any:
        """The Call that this belongs to, looked up when first asked for; None if not known."""
        # No cached_property: up to Python 3.11 its lock is one for all events.
        if "_call" not in self.__dict__:
            self.__dict__["_call"] = self.find_call(self) if self.find_call else None
        return self.__dict__["_call"]


@dataclass(frozen=True)
class LegEvent(CallEvent):
    """What newCall, answer and hangup have in common."""

    from_number: str = ""  # E.164 digits without "+", or "anonymous", or a SIP id
    to_number: str = ""
    direction: str = ""  # "in" or "out"
    orig_call_id: str = ""  # the first leg, after a transfer
    xcid: str = ""  # the same on all forwarded legs
    diversion: str = ""  # the number first dialled


@dataclass(frozen=True)
class NewCallEvent(LegEvent):
    """A leg starts to ring. `users`: those whose phones ring, or the one who calls out."""

    event: str = "newCall"
    function: ClassVar[str] = "on_new_call"
    users: tuple[str, ...] = ()
    user_ids: tuple[str, ...] = ()  # such as "w0"
    full_user_ids: tuple[str, ...] = ()  # such as "1234567w0"

    @property
    def first_leg(self) -> bool:
        """Whether this begins a call, and is no further leg of one, such as a transfer."""
        return self.orig_call_id in ("", self.call_id)


@dataclass(frozen=True)
class AnswerEvent(LegEvent):
    """Somebody or something answered: voicemail and queues do too, without a user."""

    event: str = "answer"
    function: ClassVar[str] = "on_answer"
    is_decided: ClassVar[bool] = False
    user: str = ""
    user_id: str = ""
    full_user_id: str = ""
    answering_number: str = ""


@dataclass(frozen=True)
class HangupEvent(LegEvent):
    """A leg ended. `cause`: normalClearing, busy, cancel, noAnswer, congestion, forwarded, ..."""

    event: str = "hangup"
    function: ClassVar[str] = "on_hangup"
    is_decided: ClassVar[bool] = False
    cause: str = ""
    answering_number: str = ""


@dataclass(frozen=True)
class DtmfEvent(CallEvent):
    """Digits that a <Gather> collected: "" if no key was pressed, "-1" if the caller hung up.

    `state` is what gather(state=...) was given.
    """

    event: str = "dtmf"
    function: ClassVar[str] = "on_dtmf"
    dtmf: str = ""
    state: str = ""


# A further event: a class above (is_decided=False, if its function is to run later), named here;
# its fields below; a line in ROUTES; its function in CallFunctions; what event_line prints; whether
# Receiver._taken_unsigned takes it. If a reply has to ask for it: its attribute in response_xml.
EVENTS: dict[str, type[CallEvent]] = {
    kind.event: kind for kind in (NewCallEvent, AnswerEvent, HangupEvent, DtmfEvent)}
FIELDS = {  # of the form, each with its name here
    "callId": "call_id", "origCallId": "orig_call_id", "xcid": "xcid", "direction": "direction",
    "from": "from_number", "to": "to_number", "diversion": "diversion", "cause": "cause",
    "user": "user", "userId": "user_id", "fullUserId": "full_user_id", "dtmf": "dtmf",
    "user[]": "users", "userId[]": "user_ids", "fullUserId[]": "full_user_ids",
    "answeringNumber": "answering_number"}


def parse_event(body: bytes, default_event: str, state: str = "", **more: Any) -> CallEvent:
    """Return the event that the form in `body` holds, `more` among its attributes.

    The event named in the body decides; `default_event` stands in where it names none. Unknown
    events and fields are kept. Raises WebhookError: 400 for what is no form or has a single
    field twice, 404 if there is no event at all. (sipgate's Push API, "Events".)
    """
    if body and b"=" not in body:
        raise WebhookError(400, "the body is not a form (application/x-www-form-urlencoded)")
    try:
        # Decoded before parse_qs, which fails on bytes above 127 in Python 3.8 to 3.12.1; and the
        # brackets too, which it takes a quarter of its time for.
        text = body.decode("utf-8", "replace").replace("%5B%5D=", "[]=")
        form = urllib.parse.parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise WebhookError(400, f"the form has more than {MAX_FIELDS} fields") from None
    name = _single("event", form.get("event", [""])) or default_event
    if not name:
        raise WebhookError(404, "no event is named", "a webhook came in that names no event")
    kind = EVENTS.get(name, CallEvent)  # which is for what sipgate may add one day
    values: dict[str, Any] = {"state": state} if kind is DtmfEvent else {}
    for key, found in form.items():
        # user[] as documented, user[][0] as sipgate's own test sends it.
        wire = re.sub(r"\[\]\[[0-9]+\]\Z", "[]", key) if "][" in key else key
        python = FIELDS.get(wire, "")
        if python not in kind.__dataclass_fields__:
            continue
        if not wire.endswith("[]"):
            values[python] = _single(key, found)
        elif any(found):
            values[python] = (*values.get(python, ()), *found)
    return kind(event=name, fields=form, body=body, **values, **more)


def _single(key: str, values: Sequence[str]) -> str:
    if len(values) > 1:
        raise WebhookError(400, f"the form has {key} more than once")
    return values[0]


# ------------------------------------------------------------------------------------------
# Actions and XML
# What a reply can ask of sipgate: one small function for each verb of its XML, and the one that
# writes the document. A further verb is a function here; one that ends a call also stands beside
# Reject and Hangup in put_together. Knows no settings.
# ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Action:
    """What happens to the call, as an element of sipgate's XML; made by the functions below."""

    xml: str


def _ensure(is_right: object, argument: str, value: object, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{argument} is {value!r}: expected {expected}")


def _phone_number(argument: str, value: str) -> str:
    digits = re.sub(r"\A\s*\+|[\s()/-]", "", value) if isinstance(value, str) else ""
    # "+49 (0) 211" means 49211; without the brackets it would be a wrong number.
    _ensure(re.fullmatch("[1-9][0-9]{0,31}", digits) and not re.search(r"\(\s*0\s*\)", value),
            argument, value, "text of digits that begin with the country code, without 0 or 00, "
            "such as '4915799912345'")
    return digits


def _absolute_url(argument: str, value: str) -> str:
    _ensure(isinstance(value, str) and re.fullmatch(r"https?://[A-Za-z0-9\[][!\x22$-~]*", value),
            argument, value, "a URL that begins with http:// or https://")
    return value


def _at_least_one(argument: str, value: int) -> str:
    _ensure(type(value) is int and value > 0, argument, value, "a whole number of 1 or more")
    return str(value)


def dial(*numbers: str, caller_id: str | None = None, anonymous: bool | None = None) -> Action:
    """Forward the call to 1 to 5 `numbers`, which ring together.

    Numbers are E.164 digits; +, blanks, dashes, slashes and brackets are removed.
    `caller_id` is the number to show, `anonymous` whether to show none. Raises ValueError.
    """
    _ensure(1 <= len(numbers) <= 5, "the count of numbers", len(numbers), "1 to 5")
    element = ET.Element("Dial")
    if caller_id is not None:
        element.set("callerId", _phone_number("caller_id", caller_id))
    if anonymous is not None:
        _ensure(isinstance(anonymous, bool), "anonymous", anonymous, "True or False")
        element.set("anonymous", str(anonymous).lower())
    for number in numbers:
        ET.SubElement(element, "Number").text = _phone_number("numbers", number)
    return Action(ET.tostring(element, "unicode"))


def voicemail() -> Action:
    """Send the caller to voicemail."""
    return Action("<Dial><Voicemail /></Dial>")


def play(url: str) -> Action:
    """Play the sound at `url`; then the call goes on as configured.

    It must be WAV, mono, 16-bit PCM, 8 kHz. Raises ValueError for a URL that is not absolute.
    """
    element = ET.Element("Play")
    ET.SubElement(element, "Url").text = _absolute_url("url", url)
    return Action(ET.tostring(element, "unicode"))


def gather(url: str | None = None, *, play: str | None = None, max_digits: int = 1,
           timeout_ms: int = 2000, state: str | None = None) -> Action:
    """Collect up to `max_digits` digits, after the sound at `play`; they come back to on_dtmf.

    `url` is the address to send them to instead of our own, `timeout_ms` runs from the end of
    the sound, in milliseconds, and `state` comes back as event.state. Raises ValueError.
    """
    # A path is completed by response_xml.
    target = "/on-data" if url is None else _absolute_url("url", url)
    if state is not None:
        _ensure(isinstance(state, str), "state", state, "text")
        target += ("&" if "?" in target else "?") + urllib.parse.urlencode({"state": state})
    element = ET.Element("Gather", onData=target,
                         maxDigits=_at_least_one("max_digits", max_digits),
                         timeout=_at_least_one("timeout_ms", timeout_ms))
    if play is not None:
        sound = ET.SubElement(element, "Play")
        ET.SubElement(sound, "Url").text = _absolute_url("play", play)
    return Action(ET.tostring(element, "unicode"))


def reject(reason: str = "rejected") -> Action:
    """Refuse the call: the caller hears that it is rejected, or with "busy" the busy tone."""
    _ensure(reason in ("rejected", "busy"), "reason", reason, "'rejected' or 'busy'")
    return Action('<Reject reason="busy" />' if reason == "busy" else "<Reject />")


def hang_up() -> Action:
    """End the call."""
    return Action("<Hangup />")


def response_xml(action: Action | None = None, base_url: str = "") -> bytes:
    """Return sipgate's <Response> document, in ASCII, with `action` in it.

    It asks for the further events of the call, at the routes below `base_url`; without that for
    none, and a gather() without a URL of its own raises ValueError.
    """
    response = ET.Element("Response")
    if base_url:
        response.set("onAnswer", base_url + "/on-answer")
        response.set("onHangup", base_url + "/on-hangup")
    if action:
        element = ET.fromstring(action.xml)
        target = element.get("onData", "")
        if target.startswith("/"):
            if not base_url:
                raise ValueError("gather() without a URL needs WEBHOOK_URL")
            element.set("onData", base_url + target)
        response.append(element)
    return ET.tostring(response) + b"\n"


# ------------------------------------------------------------------------------------------
# Worker
# What may be slow waits here for a thread of its own. Knows nothing of what it carries.
# ------------------------------------------------------------------------------------------

class Worker(threading.Thread):
    """A queue, and the one thread that empties it, in order."""

    IDLE_SECONDS = 1.0
    BATCH = 1000

    def __init__(self, name: str, work: Callable[[list[Any]], None], limit: int) -> None:
        """Start the thread: it calls `work` with a list of what waits, up to BATCH items.

        `limit` items may wait. After IDLE_SECONDS without any the list is empty. What `work`
        drops from its end comes again.
        """
        super().__init__(name=name, daemon=True)
        self._work, self.limit = work, limit
        self.items: list[Any] = []  # not done yet, what is being worked on included
        self.lock = threading.Condition()
        self._is_closing = False
        self.start()

    def put(self, item: Any) -> bool:
        """Queue `item`, without waiting; False if there is no room."""
        with self.lock:
            if len(self.items) >= self.limit:
                return False
            if not self.items:  # while there are any, the thread is awake
                self.lock.notify()
            self.items.append(item)
            return True

    def is_needed(self) -> bool:
        """Whether something waits, or the end of the thread."""
        return bool(self.items or self._is_closing)

    def finish(self, seconds: float) -> list[Any]:
        """Wait up to `seconds` for what was put, and end the thread; return what is not done."""
        with self.lock:
            self._is_closing = True
            self.lock.notify()
        self.join(seconds)
        return self.items[:]

    def run(self) -> None:
        while self.items or not self._is_closing:
            with self.lock:
                self.lock.wait_for(self.is_needed, self.IDLE_SECONDS)
                batch = self.items[:self.BATCH]
            try:
                self._work(batch)
            except Exception:  # the thread serves all that comes later, too
                logger.exception("an error in this program; %d entries are passed over", len(batch))
            with self.lock:
                del self.items[:len(batch)]


# ------------------------------------------------------------------------------------------
# Call log
# Puts events on disk, in one SQLite file. Knows no HTTP and no XML.
#
# One worker writes; what has queued up shares one transaction, and so one fsync. After an error of
# disk, SQLite or memory the same events are tried again; each has its id before, so that none is
# stored twice.
# ------------------------------------------------------------------------------------------

APPLICATION_ID = 0x73676365  # "sgce": the file is ours
SCHEMA_VERSION = 2
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE events(
    id INTEGER PRIMARY KEY,  -- microseconds of Unix time at receipt, made unique
    event TEXT,              -- sipgate's word, or reply
    call_id TEXT,
    orig_call_id TEXT,       -- NULL where empty or equal to call_id
    xcid TEXT,               -- NULL where empty
    body BLOB,               -- as received; of a reply: the XML
    digest BLOB UNIQUE       -- NULL where repeats count
);
CREATE INDEX events_call_id ON events(call_id);
CREATE INDEX events_orig_call_id ON events(orig_call_id) WHERE orig_call_id IS NOT NULL;
CREATE INDEX events_xcid ON events(xcid, id) WHERE xcid IS NOT NULL;
PRAGMA application_id={APPLICATION_ID};
PRAGMA user_version={SCHEMA_VERSION};
COMMIT;
"""
INSERT = """INSERT OR IGNORE INTO events VALUES (:id, :event, :call_id,
    nullif(nullif(:orig_call_id, ''), :call_id), nullif(:xcid, ''), :body, :digest)"""
SAME = """SELECT id FROM events
    WHERE digest = :digest OR (id = :id AND event = :event AND body = :body)"""
EMPTY_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
STORE_SECONDS = 1.0  # that a webhook waits for the disk
DAY = 24 * 3600.0


def rewrite(database: sqlite3.Connection, folder: str) -> None:
    """Write the file in `folder` anew, without what deleted rows have left in it."""
    # Its temporary file holds numbers, too: beside the log, and not where others look.
    database.execute("PRAGMA temp_store_directory='{}'".format(folder.replace("'", "''")))
    database.execute("VACUUM")


@dataclass
class Entry:
    """A row on its way to disk."""

    event: str
    call_id: str
    body: bytes
    orig_call_id: str = ""
    xcid: str = ""
    digest: bytes | None = None
    id: int = 0
    # Gets whether it is new, which a repeat is not, once it is stored; None if that has failed.
    outcome: queue.SimpleQueue[bool | None] = field(default_factory=queue.SimpleQueue)


class CallLog:
    """The events of the last days, on disk. Safe to use from many threads.

    While the disk is full, slow or hangs, calls go on: their events wait in memory, QUEUE of them
    at most, and are tried again; stderr and /healthz say so, and stderr what is lost in the end.
    Meanwhile a repeat counts as new. Only at the start, and when the file is closed at the stop, a
    disk that hangs is waited for.

    Numbers are in this file, and in one put aside as damaged, which only its owner may read, for
    CALL_LOG_DAYS and about a day more; longer while this does not run, the disk is full, another
    program reads the file, or no minute is without an event. They are in stdout (CALL_OUTPUT), for
    as long as that is kept; on the page; and where your functions put them. The server's messages
    on stderr have none, but for what your functions raise.
    """

    QUEUE = 10_000  # events that may wait while the disk takes none
    LOCK_SECONDS = 0.5  # that another process may hold the lock before we are behind
    RETRY_SECONDS = 0.2
    STEP_ROWS = 200  # to remove at a time: an event may have to wait for that
    FIRST_SECONDS = 600.0  # from the start to the removal: a wrong clock shows by then
    QUIET_SECONDS = 60.0  # without an event, before VACUUM
    clock: Callable[[], float] = time.time

    def __init__(self, path: str, days: int) -> None:
        """Open or create the file at `path` that keeps events for `days`. Raises SettingsError."""
        # Behind a link it is the file itself that is made private, or put aside.
        self.path, self.days = os.path.realpath(path), days
        self.behind = ""  # why events wait; "" while they do not
        self._database: Any = None  # while it is not open
        # Kept open: closing it would drop all locks of the process on it, SQLite's too (POSIX).
        self._file: Any = io.BytesIO()  # none yet
        self._last_id = 0
        try:
            self._open()
        except sqlite3.Error as error:  # locked, for instance: calls are taken all the same
            self._fail(error)
        except OSError as error:
            self._file.close()
            raise SettingsError(f'CALL_LOG is "{path}": {error.strerror or error}; expected a file '
                                "in a folder that this user may write, or off") from None
        self._newest = self._last_id / 1e6  # at the start
        self._remove_at = time.monotonic() + self.FIRST_SECONDS
        self._believe_at = time.monotonic() + DAY  # a clock that has held for so long
        self._worker = Worker("call-log", self._work, self.QUEUE)

    def record(self, event: CallEvent, received_at: float, digest: bytes | None) -> bool | None:
        """Store `event`, received at that Unix time; whether it is new, None if not known yet.

        Waits up to STORE_SECONDS, but not while the log is behind. `digest` None: a repeat counts.
        """
        # sipgate has no such event, and none is to pass for a reply of ours.
        kind = "?reply" if event.event == "reply" else event.event
        entry = Entry(kind, event.call_id, event.body, getattr(event, "orig_call_id", ""),
                      getattr(event, "xcid", ""), digest)
        self._queue(entry, received_at)
        try:
            return entry.outcome.get(timeout=0 if self.behind else STORE_SECONDS)
        except queue.Empty:
            if not self.behind:
                self._fall_behind("storing takes longer than a call can wait")
            return None

    def record_reply(self, event: CallEvent, document: bytes) -> None:
        """Store the XML of the reply to `event`, without waiting for it."""
        self._queue(Entry("reply", event.call_id, document), self.clock())

    def close(self, seconds: float) -> None:
        """Store what is queued, for up to `seconds`, and close the file."""
        left = self._worker.finish(seconds)
        if left:
            logger.error("events could not be stored, of the calls %s",
                         ", ".join(dict.fromkeys(entry.call_id for entry in left)))
        if not self._worker.is_alive():  # or it has the database, and perhaps for ever
            self._disconnect()
            self._file.close()

    def _queue(self, entry: Entry, received_at: float) -> None:
        now = int(received_at * 1e6)
        with self._worker.lock:  # or ids would not be committed in their order
            # A clock put back a little is bridged, one that was wrong is not followed.
            ahead = self._last_id + 1 if self._last_id - now < 3600e6 else 0
            entry.id = self._last_id = max(now, ahead)
            is_queued = self._worker.put(entry)
        if not is_queued:
            logger.error("the call log has no room: %s of call %s is not stored", entry.event,
                         entry.call_id)

    def _fall_behind(self, reason: str) -> None:
        self.behind = reason
        logger.warning("the call log is behind (%s): calls go through, their events wait in memory",
                       reason)

    # What follows runs in the worker's thread.

    def _work(self, batch: list[Entry]) -> None:
        try:
            if not self._database:
                self._open()
            elif not self._is_there():
                raise OSError("the file was deleted or replaced")
            if batch:
                self._store(batch)
            if self.behind and self._worker.items == batch:
                self.behind = ""
                logger.info("the call log has caught up: all events are stored")
            if time.monotonic() >= self._remove_at:
                self._remove_at = time.monotonic() + self._remove()
        except (sqlite3.Error, OSError, MemoryError) as error:
            batch.clear()  # to get it again
            for entry in self._worker.items[:]:  # first: nobody is to wait for the rest
                if entry.outcome.empty():  # or it would grow with each try
                    entry.outcome.put(None)
            self._fail(error)
            time.sleep(self.RETRY_SECONDS)

    def _open(self) -> None:
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise OSError("it is no file")
        if not self._is_there():
            self._file.close()
            # Created here, since SQLite would let others read it; -wal and -shm take after it.
            self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "rb", 0)
        self._file.seek(0)
        head = self._file.read(72)
        # Read here too: SQLite cannot tell a damaged file of ours from another program's.
        marks = [int.from_bytes(head[at:at + 4], "big") for at in (60, 68)]
        if head and marks != [SCHEMA_VERSION, APPLICATION_ID]:
            raise OSError("it is not a call log of this version of the program, and is left alone")
        with contextlib.suppress(OSError):
            os.chmod(self.path, 0o600)
        self._database = sqlite3.connect(self.path, timeout=self.LOCK_SECONDS, isolation_level=None,
                                         check_same_thread=False)
        if not head:
            self._database.executescript(SCHEMA)
        newest, = self._database.execute("SELECT max(id) FROM events").fetchone()
        self._database.executescript("PRAGMA synchronous=FULL; PRAGMA fullfsync=ON; "
                                     "PRAGMA secure_delete=ON")
        # Not before: the marks go into the file itself, and not into -wal.
        with contextlib.suppress(sqlite3.OperationalError):  # as on some network file systems
            self._database.execute("PRAGMA journal_mode=WAL")
        self._last_id = max(self._last_id, newest or 0)

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # it is gone, or not open
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        return False

    def _disconnect(self) -> None:
        if self._database:
            with contextlib.closing(self._database), contextlib.suppress(sqlite3.Error):
                self._database.execute(EMPTY_WAL)  # SQLite does not, once the file was replaced
        self._database = None

    def _fail(self, error: Exception) -> None:
        self._fall_behind(str(error) or type(error).__name__)  # as of a MemoryError
        self._disconnect()  # which rolls back
        if type(error) is sqlite3.DatabaseError:  # as SQLITE_CORRUPT and SQLITE_NOTADB alone are
            self._file.close()  # or Windows would not let it be renamed
            name = f"{self.path}.damaged-{self.clock():.0f}"
            for suffix in ("", "-wal", "-shm", "-journal"):
                with contextlib.suppress(OSError):
                    os.replace(self.path + suffix, name + suffix)
            logger.error("the call log was damaged; it is now %s, and a new one is begun", name)

    def _store(self, batch: list[Entry]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        outcomes = [self._insert(entry) for entry in batch]
        self._database.execute("COMMIT")
        for entry, is_new in zip(batch, outcomes):
            entry.outcome.put(is_new)

    def _insert(self, entry: Entry) -> bool:
        while not self._database.execute(INSERT, vars(entry)).rowcount:
            same = self._database.execute(SAME, vars(entry)).fetchone()
            if same:
                # Under our own id it is our first try, of which we were told that it failed.
                return bool(same[0] == entry.id)
            entry.id += 1  # another copy of this program, or a clock that was put back
        return True

    def _remove(self) -> float:
        """Remove some of what is too old; return the seconds until the next step."""
        now = self.clock()
        if now - self._newest > DAY and time.monotonic() < self._believe_at:
            return DAY  # perhaps the clock is wrong
        before = now - self.days * DAY
        try:
            for path in glob.glob(glob.escape(self.path) + ".damaged-*"):
                if os.path.getmtime(path) < before:
                    os.remove(path)
            removed = self._database.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE id < ? LIMIT ?)",
                (int(before * 1e6), self.STEP_ROWS)).rowcount
            if removed == self.STEP_ROWS:
                return 0.0
            if abs(now - self._last_id / 1e6) < self.QUIET_SECONDS:
                return self.QUIET_SECONDS
            self._rewrite()
        except (sqlite3.OperationalError, OSError) as error:
            logger.warning("old events are not wholly gone (%s); the next try is in an hour", error)
            return 3600.0
        return DAY

    def _rewrite(self) -> None:
        folder = os.path.dirname(self.path)
        self._empty_wal()  # a reader that is in the way would be so after VACUUM, too
        if shutil.disk_usage(folder).free < 2.5 * os.path.getsize(self.path):
            raise OSError("there is no room to write it anew")
        self._database.set_progress_handler(self._worker.is_needed, 1000)
        try:  # until an event comes, or the stop
            rewrite(self._database, folder)
        finally:
            self._database.set_progress_handler(None, 0)
        self._empty_wal()

    def _empty_wal(self) -> None:
        if self._database.execute(EMPTY_WAL).fetchone()[0]:
            raise OSError("another program reads it")


# ------------------------------------------------------------------------------------------
# Receiving
# From the bytes of a webhook to the bytes of its reply: verify, parse, store, decide, render;
# then what follows. Knows no sockets and no request heads.
# ------------------------------------------------------------------------------------------

class CallFunctions(NamedTuple):
    """Your code."""

    on_new_call: Callable[[NewCallEvent], Action | None] = on_new_call
    on_answer: Callable[[AnswerEvent], None] = on_answer
    on_hangup: Callable[[HangupEvent], None] = on_hangup
    on_dtmf: Callable[[DtmfEvent], Action | None] = on_dtmf


def _nothing(event: CallEvent) -> None:
    """Your functions as they come."""


def _content(function: Any) -> Any:
    code = getattr(function, "__code__", None)
    return code and (code.co_code, code.co_consts[1:])  # without the docstring


class YourCode:
    """Runs your functions: on_new_call and on_dtmf while the caller waits, the others later.

    A thread cannot be killed: code that hangs keeps its slot until it returns.
    """

    SLOTS = 8
    SLOT_SECONDS = 0.5  # that a call waits for one
    STUCK_SECONDS = 60.0  # that a run may take before it is named
    FULL_SECONDS = 3.0  # the same while no slot is left

    def __init__(self, functions: CallFunctions) -> None:
        # What does nothing needs no thread.
        self.functions = {name: function for name, function in functions._asdict().items()
                          if _content(function) != _content(_nothing)}
        self._slots = threading.Semaphore(self.SLOTS)
        self._running: list[tuple[CallEvent, float]] = []  # for what, since when
        self.hooks = Worker("hooks", self._run_first, 1000)

    def decide(self, event: CallEvent, deadline: float) -> Action | None:
        """Return what your function makes of `event`; None if it fails, or not by `deadline`.

        That is 3 s (Receiver.reply_seconds) after the body was read; storing the event has used a
        second of them at most. The caller waits no longer, as long as Python runs.
        """
        if event.function not in self.functions:
            return None
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Thread.start() waits for its thread to begin: for ever, if memory has run out.
        thread = _thread.start_new_thread(self._run_in_slot, (event, outcome))
        try:
            action = outcome.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            # Without the source lines, whose file could be on a disk that hangs.
            frames = traceback.walk_stack(sys._current_frames().get(thread))
            below = "\n".join(str(frame) for frame, _ in frames)
            logger.error("%s has not returned in time; the call goes through undecided. It is at",
                         event.function, extra={"below": below})
            return None
        if action is None or isinstance(action, Action):
            return action
        logger.error("%s returned a %s, not an action such as voicemail(); the call goes through "
                     "undecided", event.function, type(action).__name__)
        return None

    def run_later(self, event: CallEvent) -> None:
        """Queue a run of your function; never waits."""
        if event.function in self.functions and not self.hooks.put(event):
            logger.warning("%s was not run: 1000 events wait for your code", event.function)

    def stuck(self) -> str:
        """What of your code does not return, "" if there is nothing."""
        running = self._running[:]
        is_full = sum(event.is_decided for event, _ in running) >= self.SLOTS
        for event, since in running:
            limit = self.FULL_SECONDS if is_full and event.is_decided else self.STUCK_SECONDS
            if time.monotonic() - since > limit:
                return (f"your code is stuck: {event.function} has been running for over "
                        f"{limit:.0f} seconds")
        return ""

    def _run_in_slot(self, event: CallEvent, outcome: queue.SimpleQueue[Any]) -> None:
        action = None
        if not self._slots.acquire(timeout=self.SLOT_SECONDS):
            logger.warning("all %d slots are taken by your code, which has not returned; the call "
                           "goes through undecided", self.SLOTS)
            outcome.put(None)
            return
        try:
            action = self._run(event)
        finally:  # even if reporting its error has failed
            self._slots.release()
            outcome.put(action)

    def _run_first(self, batch: list[CallEvent]) -> None:
        del batch[1:]  # they wait
        for event in batch:
            self._run(event)

    def _run(self, event: CallEvent) -> Any:
        """What your function returns; None, with a message, if it raises."""
        run = (event, time.monotonic())
        self._running.append(run)
        try:
            return self.functions[event.function](event)
        except BaseException as error:  # noqa: BLE001 - sys.exit() in your code is no end of ours
            trace: Any = error.__traceback__  # its first frame is this one
            # Text from here on: making it could hang, and the logger's lock with it.
            below = traceback.format_exception(None, error, trace.tb_next, -20, False)
            logger.error("%s raised %s; the call goes on without it", event.function,
                         type(error).__name__, extra={"below": "".join(below)})
            return None
        finally:
            self._running.remove(run)


class Reply(NamedTuple):
    """What goes back over HTTP."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class Replied(NamedTuple):
    """An event and its reply."""

    event: CallEvent
    reply: Reply
    received_at: float  # Unix time
    is_new: bool = True  # no exact repeat
    action: Action | None = None


DISCARDED = Reply(200, b"This response will be discarded")
# What can be wrong with a signature, and why, if the webhook is sipgate's all the same.
SIGNATURE_FAULTS = {
    "missing": "a proxy drops X-Sipgate-Signature. Without one, trial mode takes requests to "
               "http://localhost alone, VERIFY_SIGNATURE=new-call all but newCall",
    "malformed": "a proxy changes X-Sipgate-Signature",
    "does not match": "a proxy changes the body, or sipgate has a new key (SIGNATURE_KEY_FILE)",
}


@dataclass
class Receiver:
    """Turns webhooks into replies. Safe to use from many threads."""

    settings: Settings
    keys: Sequence[PublicKey]
    functions: CallFunctions
    show: Callable[[Replied], Any] = lambda replied: None  # may not wait
    call_log: CallLog | None = None
    find_call: Callable[[CallEvent], Any] | None = None
    # sipgate waits 10 s for the reply to a newCall, and until then the phone does not ring.
    reply_seconds: float = 3.0
    refused: int = 0  # webhooks, since the start; about

    def __post_init__(self) -> None:
        base = self.settings.base_path
        # The first two are WEBHOOK_URL as it stands, if that was entered at sipgate.
        self.routes = {base or "/": "", base + "/": "",
                       **{base + route: event for route, event in ROUTES.items()}}
        # Made before anything can go wrong.
        self._undecided = response_xml(None, self.settings.base_url)
        self.your_code = YourCode(self.functions)

    def health(self) -> str:
        """What is wrong, "" if nothing is."""
        is_behind = self.call_log and self.call_log.behind
        return "the call log is behind" if is_behind else self.your_code.stuck()

    def admit(self, target: str, body: bytes, signature: str | None = None,
              outside: str = "") -> CallEvent:
        """The event of the webhook `body`, POSTed to `target` (path and query).

        `signature` is its X-Sipgate-Signature, `outside` the host it was addressed to if it came
        from beyond this machine, in trial mode. Raises WebhookError: without a valid signature an
        event gets 403, and is neither stored nor run. But VERIFY_SIGNATURE=new-call takes answer,
        hangup and dtmf unsigned; off, and trial mode from this machine, all events. A forged hangup
        falsifies the call log, runs on_hangup, and ends no call.
        """
        path, _, query = target.partition("?")
        unsigned = self._taken_unsigned(outside)
        try:
            if path not in self.routes:
                logger.warning("a webhook came in at %s, where nothing is: the URL at sipgate is "
                               "not WEBHOOK_URL plus /new-call, or a proxy changes the path",
                               path[:80])
                raise WebhookError(404, "not found")
            if signature is not None or not unsigned:
                self._verify(body, signature)
            state = dict(urllib.parse.parse_qsl(query)).get("state", "") if query else ""
            event = parse_event(body, self.routes[path], state, signature=signature,
                                find_call=self.find_call)
            if signature is None and not isinstance(event, unsigned):
                self._verify(body, None)  # which raises
            if not event.call_id and CallEvent not in unsigned:
                raise WebhookError(400, "callId is missing")
        except WebhookError:
            self.refused += 1
            raise
        if self.routes[path] not in ("", event.event) and event.event in EVENTS:
            logger.warning("event %s came in on %s, the path of another event: check the URLs at "
                           "sipgate", event.event, path)
        return event

    def _taken_unsigned(self, outside: str) -> tuple[type[CallEvent], ...]:
        """The events that are taken without a signature; CallEvent: all of them."""
        mode, is_trial = self.settings.verify_signature, self.settings.trial
        if mode == "off" or (is_trial and not outside):
            return (CallEvent,)
        return (AnswerEvent, HangupEvent, DtmfEvent) if mode == "new-call" and not is_trial else ()

    def _verify(self, body: bytes, signature: str | None) -> None:
        if self.settings.verify_signature == "off" or is_signed(body, signature, self.keys):
            return
        is_whole = len(decode_signature(signature)) in [key.size for key in self.keys]
        fault = "does not match" if is_whole else "malformed" if signature else "missing"
        raise WebhookError(
            403, f"signature {fault}, see VERIFY_SIGNATURE",
            f"a webhook was refused, signature {fault}: it is not from sipgate, or "
            f"{SIGNATURE_FAULTS[fault]}")

    def reply_to(self, event: CallEvent, deadline: float, outside: str = "") -> Replied:
        """Store the event, decide, and return the reply: by `deadline` (time.monotonic()).

        From here on the call is real, and no fault of ours may keep it from going through.
        """
        received_at, is_new, action = time.time(), True, None
        base_url = self.settings.base_url
        if outside and self.settings.trial:
            base_url = ""  # ours, on localhost, would lead sipgate nowhere
            logger.warning("this came in for %s; restart with --url https://%s to get answer and "
                           "hangup too", outside, outside)
        # A kind of event that is not known needs no further ones.
        document = self._undecided if base_url and event.function else response_xml()
        try:
            is_new = self._record(event, received_at)
            decision = self.your_code.decide(event, deadline) if event.is_decided else None
            if decision:
                document, action = response_xml(decision, base_url), decision
        except Exception:  # such as a gather() that needs our URL
            logger.exception("a reply could not be made; the call goes through undecided")
        reply = Reply(200, document, "application/xml") if event.is_decided else DISCARDED
        return Replied(event, reply, received_at, is_new, action)

    def _record(self, event: CallEvent, received_at: float) -> bool:
        """Have the event stored; False for an exact repeat, where signatures are checked."""
        digest = None
        if isinstance(event, LegEvent) and CallEvent not in self._taken_unsigned(""):
            digest = hashlib.sha256(event.event.encode() + b"\0" + event.body).digest()
        return not self.call_log or self.call_log.record(event, received_at, digest) is not False

    def follow(self, replied: Replied) -> None:
        """Have done what follows a reply; never waits."""
        if self.call_log and replied.action and replied.is_new:
            self.call_log.record_reply(replied.event, replied.reply.body)
        self.show(replied)
        if replied.is_new and not replied.event.is_decided:
            self.your_code.run_later(replied.event)


# ------------------------------------------------------------------------------------------
# HTTP
# One request after the other from a connection, strictly framed (RFC 9112), in time and
# within limits; one reply to each. Knows nothing of XML and SQL.
#
# The readers raise WebhookError for what is refused, EOFError where the input ends: then no
# request happened. http.server's own header parser is the e-mail parser: to that a bare CR begins
# a new header, and one bad line ends them all, Content-Length included.
# ------------------------------------------------------------------------------------------

MAX_LINE = 8 * 1024  # bytes of a request or header line
MAX_HEAD = 32 * 1024
MAX_HEADERS = 64
MAX_BODY = 64 * 1024
MAX_CHUNKS = 1000  # with a byte in each, a body would take long

REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.([01])\r\n")
HEADER_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):([\t\x20-\x7e\x80-\xff]*)\r\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,6})\r\n")
LENGTH = re.compile("[0-9]{1,9}")
HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
FORM_TYPE = "application/x-www-form-urlencoded"
# Twice, each of these is a way to make two readers see two different requests.
SINGLE_HEADERS = {"content-length", "host", "transfer-encoding", "expect", "content-type",
                  "x-sipgate-signature"}
# What tunnels and proxies add, and browsers to what a web page sends.
PASSED_ON = ("x-forwarded-", "forwarded", "via", "x-real-ip", "x-original-", "cf-",
             "true-client-ip", "origin", "sec-fetch-")


class RequestHead(NamedTuple):
    """A request line and its headers; names in lower case, repeated ones joined by ", "."""

    method: str
    target: str  # path and query
    minor: int  # of the version: 0 or 1
    headers: dict[str, str]


def _require(is_so: bool, status: int, reason: str) -> None:
    if not is_so:
        raise WebhookError(status, reason)


def _matched(pattern: re.Pattern[Any], text: Any, what: str) -> re.Match[Any]:
    match = pattern.fullmatch(text)
    if match is None:
        raise WebhookError(400, "malformed " + what)
    return match


def _line(stream: io.BufferedIOBase) -> bytes:
    line = stream.readline(MAX_LINE + 2)
    if not line.endswith(b"\n"):
        _require(len(line) < MAX_LINE + 2, 431, "line too long")
        raise EOFError
    return line


@functools.lru_cache(maxsize=128)
def _header(line: bytes) -> tuple[str, str]:
    """Name and value of a header line; most requests bring the same ones."""
    match = _matched(HEADER_LINE, line, "header line")
    return match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")


def read_head(stream: io.BufferedIOBase) -> RequestHead:
    """Read a request head, each line judged when it is complete (RFC 9112 2 to 5)."""
    line = _line(stream)
    if line == b"\r\n":  # one empty line is skipped (RFC 9112 2.2)
        line = _line(stream)
    request = _matched(REQUEST_LINE, line, "request line")
    headers: dict[str, str] = {}
    size, count = len(line), 0
    line = _line(stream)
    while line != b"\r\n":
        name, value = _header(line)
        size, count = size + len(line), count + 1
        if size > MAX_HEAD or count > MAX_HEADERS:
            raise WebhookError(431, "too many headers")
        if name in headers:
            _require(name not in SINGLE_HEADERS, 400, "a header that must be single is repeated")
            value = f"{headers[name]}, {value}"
        headers[name] = value
        line = _line(stream)
    minor = int(request[3])
    _matched(HOST, headers.get("host", "" if minor else "none"), "or missing Host")
    return RequestHead(request[1].decode(), request[2].decode(), minor, headers)


def body_length(head: RequestHead) -> int | None:
    """Return how many bytes of body follow `head`, None if it is chunked (RFC 9112 6.3)."""
    coding = head.headers.get("transfer-encoding")
    if coding is None:
        length = int(_matched(LENGTH, head.headers.get("content-length", "0"), "length")[0])
        _require(not length or head.method not in ("GET", "HEAD"), 400, "a body on GET or HEAD")
        _require(length <= MAX_BODY, 413, "body too large")
        return length
    _require("content-length" not in head.headers, 400, "both Transfer-Encoding and a length")
    _require(coding.lower() == "chunked", 501, "transfer coding not supported")
    _require(head.method == "POST" and head.minor == 1, 400, "a chunked body where none belongs")
    return None


def _exactly(stream: io.BufferedIOBase, length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def read_body(stream: io.BufferedIOBase, length: int | None) -> bytes:
    """Read a body of `length` bytes; None: a chunked one (RFC 9112 7.1), without extras."""
    if length is not None:
        return _exactly(stream, length)
    body = b""
    for _ in range(MAX_CHUNKS):
        size = int(_matched(CHUNK_LINE, _line(stream), "chunk")[1], 16)
        _require(len(body) + size <= MAX_BODY, 413, "body too large")
        chunk = _exactly(stream, size + 2)
        _require(chunk.endswith(b"\r\n"), 400, "malformed chunk")
        if not size:
            return body
        body += chunk[:-2]
    raise WebhookError(413, "too many chunks")


def outside_host(headers: Mapping[str, str]) -> str:
    """The host that a request from beyond this machine was addressed to; "" for one from here.

    A tunnel or proxy makes every visitor look like 127.0.0.1, so the headers have to tell.
    """
    host = headers.get("host", "")
    is_local = is_loopback(HOST.sub(r"\1", host).strip("[]"))
    if is_local and not any(name.startswith(PASSED_ON) for name in headers):
        return ""
    return host if host and not is_local else "the-address-of-your-proxy"


@functools.lru_cache(maxsize=32)
def rendered(reply: Reply, is_last: bool, is_head: bool, moment: int) -> bytes:
    """The bytes of `reply` at the Unix time `moment`; nearly all replies of a second are one."""
    lines = [f"HTTP/1.1 {reply.status} {http.HTTPStatus(reply.status).phrase}",
             "Date: " + email.utils.formatdate(moment, usegmt=True),
             "Content-Type: " + reply.content_type,
             f"Content-Length: {len(reply.body)}",
             *map(": ".join, reply.headers),
             *["Connection: close"] * is_last]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if is_head else reply.body)


def _refusal(error: WebhookError) -> Reply:
    if error.detail or error.status != 404:  # admit() has spoken of a webhook at a wrong path
        logger.warning(error.detail or f"a request was refused with {error.status}: {error.reason}")
    return Reply(error.status, error.reason.encode() + b"\n")


def _other_reply(server: WebhookServer, method: str, path: str) -> Reply:
    receiver = server.receiver
    # By this `check` proves that this very path leads to this very process.
    mark = ("X-Instance", server.instance)
    if path != server.health_path:
        _require(path in receiver.routes, 404, "not found")
        return Reply(405, b"takes POST from sipgate\n", headers=(("Allow", "POST"), mark))
    if method not in ("GET", "HEAD"):
        return Reply(405, b"takes GET\n", headers=(("Allow", "GET, HEAD"), mark))
    wrong = receiver.health()
    return Reply(503 if wrong else 200, (wrong or "ok").encode() + b"\n",
                 headers=(mark, ("X-Refused", str(receiver.refused))))


def reply_to_request(server: WebhookServer, head: RequestHead, body: bytes
                     ) -> tuple[Reply, Replied | None]:
    """The reply to a complete request; to a webhook, with what is left to do."""
    receiver, headers, path = server.receiver, head.headers, head.target.partition("?")[0]
    deadline = time.monotonic() + receiver.reply_seconds
    try:
        if head.method != "POST" or path == server.health_path:
            return _other_reply(server, head.method, path), None
        outside = outside_host(headers) if receiver.settings.trial else ""
        event = receiver.admit(head.target, body, headers.get("x-sipgate-signature"), outside)
        if body and not headers.get("content-type", "").lower().startswith(FORM_TYPE):
            logger.warning("a webhook came without the Content-Type that sipgate sends (%s)",
                           FORM_TYPE)
        replied = receiver.reply_to(event, deadline, outside)
        return replied.reply, replied
    except WebhookError as error:
        return _refusal(error), None
    except Exception:
        logger.exception("an error in this program; replied 500")
        return Reply(500, b"internal error\n"), None


class WebhookRequestHandler(http.server.BaseHTTPRequestHandler):
    """One connection, in its own thread. Its socket blocks: the server ends what is late."""

    disable_nagle_algorithm = True
    server: WebhookServer

    def handle_one_request(self) -> None:
        self.close_connection = True  # until a request says otherwise
        server = self.server
        try:
            head, body = self._read_request()
        except EOFError:
            return
        except WebhookError as error:
            self._refuse(error)
            return
        if not server.go_on(self.request, server.sending_seconds, is_waiting=False):
            return
        reply, replied = reply_to_request(server, head, body)
        options = head.headers.get("connection", "").lower().replace(" ", "").split(",")
        is_last = "close" in options or not head.minor or server.is_crowded()
        content = rendered(reply, is_last, head.method == "HEAD", int(time.time()))
        try:
            self.request.sendall(content)  # in one piece: one TCP segment
        except OSError:  # an action that sipgate did not get is none
            is_last, replied = True, replied and replied._replace(action=None)
        if replied:
            server.receiver.follow(replied)
        self.close_connection = not server.go_on(self.request, server.idle_seconds) or is_last

    def _read_request(self) -> tuple[RequestHead, bytes]:
        first = self.rfile.peek(1)[:1]  # type: ignore[attr-defined]
        self.server.go_on(self.request, self.server.request_seconds)
        if first == b"\x16":  # of a TLS handshake
            logger.warning("https on the http port: the tunnel or proxy must speak http to it")
            raise EOFError
        head = read_head(self.rfile)
        length = body_length(head)
        expectation = head.headers.get("expect", "").lower()
        _require(expectation in ("", "100-continue"), 417, "expectation not supported")
        if expectation and head.minor:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return head, read_body(self.rfile, length)

    def _refuse(self, error: WebhookError) -> None:
        """Reply, and read on for a moment: closed with input unread, the client sees a reset."""
        self.request.sendall(rendered(_refusal(error), True, False, int(time.time())))
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        self.server.go_on(self.request, self.server.end_seconds)
        for _ in range(64):  # 4 MiB at most
            if not self.rfile.read(65536):
                break


class TlsFiles:
    """The certificate and key of the webhook port; a renewed pair is picked up while it runs."""

    def __init__(self, certificate: str, key: str) -> None:
        """Load the PEM files. Raises SettingsError."""
        self.paths = certificate, key
        self._stamp: list[tuple[int, int]] = []
        self._context: Any = None  # until there has been a usable pair
        self.context()

    def context(self) -> Any:
        """The context for a new connection. Raises SettingsError while there has been none."""
        try:
            # With the time of chmod, which can make a file readable.
            stamp = [(found.st_mtime_ns, found.st_ctime_ns) for found in map(os.stat, self.paths)]
            if stamp != self._stamp:
                self._stamp = stamp
                # A new one: the live one would fail while only one of the files is new.
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                # A password rather than a question on the terminal, which nobody would answer.
                context.load_cert_chain(*self.paths, password=lambda: "")
                self._context = context
        except (OSError, ValueError) as error:
            fault = ('WEBHOOK_TLS_CERT is "{}" and WEBHOOK_TLS_KEY "{}": {}; expected a PEM '
                     "certificate (with its chain) and the key that belongs to it").format(
                         *self.paths, error)
            if not self._context:
                raise SettingsError(fault) from None
            if not isinstance(error, ssl.SSLError):  # such as no descriptor left, for a while
                self._stamp = []
            logger.warning("%s; the old pair stays in use", fault)
        return self._context


@dataclass
class Connection:
    """What the server has to know of a connection, to end it in time."""

    sock: socket.socket
    deadline: float  # past it, nothing is replied to any more
    is_waiting: bool = True  # for a request, or for more of one

    def shut(self, how: int) -> None:
        with contextlib.suppress(OSError):  # it may have ended already
            # Not SSLSocket's, which drops the state of TLS under the feet of its thread.
            socket.socket.shutdown(self.sock, how)


class WebhookServer(socketserver.ThreadingTCPServer):
    """Listens on the webhook port; a thread for each connection, which ends at its deadline.

    A client that sends a byte a second holds one for 20 s at most. At the cap, the one that has
    waited longest for more of a request is ended for a newcomer; idle ones come last.
    """

    request_seconds = 10.0  # from the first byte of a request to its last
    sending_seconds = 10.0  # until the client has taken the reply: sipgate waits no longer
    idle_seconds = 75.0  # longer than nginx keeps a connection (60): it does not repeat a POST
    end_seconds = 1.0  # for what is refused, or makes room for another
    spared_seconds = 0.05  # from making room: a body can come 40 ms after its head
    max_connections = 256
    request_queue_size = 1024  # what finds no room in it, TCP tries again a second later
    timeout = 0.1  # until a signal, or what is past its deadline, is seen
    # On Windows it would let a second copy take the same port.
    allow_reuse_address = os.name != "nt"

    receiver: Receiver  # to be set before serve_until()

    def __init__(self, host: str, port: int, base_path: str = "",
                 tls: TlsFiles | None = None) -> None:
        """Bind `host` and `port` (0: any free one). Raises OSError, with the remedy."""
        self.health_path, self.tls = base_path + "/healthz", tls
        self.instance = os.urandom(8).hex()
        self.is_stopping = False
        self._changed = threading.Condition()  # guards the connections; told when one ends
        self.connections: dict[socket.socket, Connection] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), WebhookRequestHandler)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", error)
            raise OSError(f"cannot listen on {host} port {port}: {why}: set WEBHOOK_HOST to an "
                          "address of this machine, WEBHOOK_PORT to a free port") from None
        self.port = int(self.server_address[1])

    def serve_until(self, is_told: Callable[[], bool]) -> None:
        """Accept connections until `is_told`, which is asked at least ten times a second."""
        self.socket.settimeout(self.timeout)
        while not is_told():
            with self._changed:
                is_full = self._sweep() >= self.max_connections and not self._make_room()
                if is_full:
                    self._changed.wait(0.05)
            if not is_full:
                self._accept()

    def _sweep(self) -> int:
        """Cut what is past its deadline; return how many connections are not about to end."""
        now = time.monotonic()
        for connection in self.connections.values():
            if connection.deadline < now:
                connection.shut(socket.SHUT_RDWR)
        soon = now + self.end_seconds
        return sum(one.is_waiting or one.deadline > soon for one in self.connections.values())

    def _make_room(self) -> bool:
        """End the connection that has waited longest; a request that has come is replied to.

        Idle ones come last, and not in their first 65 s: so is_crowded() keeps a quarter free.
        """
        now = time.monotonic()
        latest = now + self.request_seconds - self.spared_seconds
        waiting = [one for one in self.connections.values()
                   if one.is_waiting and one.deadline < latest]
        if not waiting or len(self.connections) > 2 * self.max_connections:
            return False
        longest = min(waiting, key=lambda one: one.deadline)
        longest.is_waiting, longest.deadline = False, now + self.end_seconds
        if os.name != "nt":  # which would answer what has come with a reset
            longest.shut(socket.SHUT_RD)
        return True

    def _accept(self) -> None:
        request = None
        try:
            request, address = self.socket.accept()
            if self.tls:
                # Its thread shakes hands: a silent client would hold up all others here.
                request = self.tls.context().wrap_socket(request, server_side=True,
                                                         do_handshake_on_connect=False)
            deadline = time.monotonic() + self.request_seconds
            self.connections[request] = Connection(request, deadline)
            # Thread.start() waits for its thread to begin: for ever, if memory has run out.
            _thread.start_new_thread(self.process_request_thread, (request, address))
        except (socket.timeout, ConnectionError, ssl.SSLError):  # noqa: UP041 - before Python 3.10
            pass  # nobody came, or has gone again
        except (OSError, RuntimeError) as error:  # mostly no file descriptor or memory is left
            logger.warning("a connection could not be accepted: %s", error)
            if request:
                self.shutdown_request(request)
            with self._changed:
                self._make_room()
            time.sleep(0.05)  # or it would be tried again at once and for ever

    def shutdown_request(self, request: Any) -> None:
        with self._changed:
            self.connections.pop(request, None)
            self._changed.notify_all()
        super().shutdown_request(request)

    def is_crowded(self) -> bool:
        """Whether connections are to be closed after their reply: with notice no POST is lost."""
        return self.is_stopping or len(self.connections) > self.max_connections * 3 // 4

    def go_on(self, request: socket.socket, seconds: float, is_waiting: bool = True) -> bool:
        """Give a connection so long for what it does next; False if it is too late for that."""
        with self._changed:
            connection, now = self.connections[request], time.monotonic()
            if connection.deadline < now or (self.is_stopping and is_waiting):
                return False
            connection.deadline, connection.is_waiting = now + seconds, is_waiting
            return True

    def stop(self, seconds: float) -> None:
        """Close what waits, and wait for the replies to what is in flight, for up to `seconds`."""
        self.server_close()
        with self._changed:
            self.is_stopping = True
            known = self.connections.values()
            for connection in known:
                if connection.is_waiting:
                    connection.deadline = 0.0
            self._sweep()
            self._changed.wait_for(lambda: all(one.is_waiting for one in known), seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # that is a client that has gone
            logger.exception("an error in this program; a connection was closed")


# ------------------------------------------------------------------------------------------
# Serving
# Output that never blocks, the start and the stop.
# ------------------------------------------------------------------------------------------

STOP_SECONDS = 4.0  # and a second more for the call log


def printable(text: str, keep: str = "") -> str:
    """`text` for a terminal: what is not printable (bidi controls!) is escaped, but for `keep`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1]
                   for char in text)


def wrapped(text: str, stream: TextIO, indent: int = 2) -> str:
    """`text`, broken between words where `stream` is a terminal; further lines are indented."""
    if not stream.isatty():
        return text
    return textwrap.fill(text, shutil.get_terminal_size().columns, break_on_hyphens=False,
                         subsequent_indent=" " * indent, break_long_words=False)


class Output(io.FileIO):
    """Stands before a real stream: a print to `text` never waits, a Worker does the writing.

    What could steer a terminal is escaped; what comes while 5,000 prints wait is dropped.
    """

    def __init__(self, stream: Any) -> None:
        try:
            # Past its buffer: a thread stuck in that would hold its lock at the exit.
            descriptor = stream.fileno()
        except (AttributeError, OSError):  # pythonw has no stream, IDLE no file
            descriptor = os.open(os.devnull, os.O_WRONLY)
        super().__init__(descriptor, "w", closefd=False)
        self._encoding = str(os.device_encoding(self.fileno()) or "utf-8")
        self.worker = Worker("output", self._write, 5000)
        self.text = io.TextIOWrapper(self, self._encoding, "backslashreplace", "\n",
                                     line_buffering=True)

    def write(self, content: Any) -> int:
        text = str(content, self._encoding, "backslashreplace")
        self.put(lambda: text)
        return len(content)

    def put(self, piece: Callable[[], str]) -> None:
        """Have written what `piece` returns, once its turn has come."""
        if not self.worker.put(piece):
            logger.warning("a print was dropped: 5000 wait for their reader")

    def _write(self, batch: list[Callable[[], str]]) -> None:
        del batch[200:]  # so that there is room again soon
        text = ""
        for piece in batch:
            try:
                text += piece()
            except Exception:  # the other lines are printed all the same
                logger.exception("an error in this program; an event is not printed")
        text = "\n".join(printable(line, keep="\t") for line in text.split("\n"))
        rest = text.encode(self._encoding, "backslashreplace")
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            while rest:
                written = super().write(rest)
                if written is None:  # a non-blocking stream that is full
                    time.sleep(0.05)
                rest = rest[written or 0:]
        # Or each line would wake this thread, which makes calls a quarter slower.
        time.sleep(0.002)


def has_own_time(stream: Any) -> bool:
    """Whether what reads `stream` adds the time itself: journald (systemd.exec(5))."""
    with contextlib.suppress(AttributeError, OSError):
        status = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def throttle(seconds: float = 60.0) -> Callable[[logging.LogRecord], bool]:
    """A filter: the same warning (by its template) once in `seconds`; the others are counted."""
    said: dict[str, tuple[float, int]] = {}  # when, and how many were held back since

    def is_due(record: logging.LogRecord) -> bool:
        now, template = time.monotonic(), record.msg
        said_at, count = said.get(template, (-math.inf, 0))
        if record.levelno == logging.WARNING and now - said_at < seconds:
            said[template] = (said_at, count + 1)
            return False
        said[template] = (now, 0)
        if count:
            record.msg += f" ({count} more since the last message)"
        return True

    return is_due


class Diagnostics(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes one line for a message, whatever text from the network is in it."""

    with_time = False

    def format(self, record: logging.LogRecord) -> str:
        line, below = f"{record.levelname}: {record.getMessage()}", getattr(record, "below", "")
        if self.with_time:
            line = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(record.created)) + line
        if record.exc_info:
            below = "".join(traceback.format_exception(*record.exc_info))
        # Indented, so that a line feed in an error's text cannot begin what looks like a message.
        return "\n    ".join([wrapped(printable(line), self.stream), *below.splitlines()])


@contextlib.contextmanager
def diagnostics(stream: TextIO) -> Iterator[Diagnostics]:
    """Lead our messages to `stream`."""
    handler = Diagnostics(stream)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def outputs() -> Iterator[Output]:
    """Lead sys.stdout, sys.stderr and our messages through Outputs; that of stdout is yielded."""
    real = sys.stdout, sys.stderr
    out, err = Output(real[0]), Output(real[1])
    sys.stdout, sys.stderr = out.text, err.text
    try:
        with diagnostics(err.text) as handler:
            handler.with_time = not has_own_time(real[1])
            handler.addFilter(throttle())
            yield out
    finally:
        sys.stdout, sys.stderr = real
        for output in (out, err):
            output.text.flush()
            output.worker.finish(0.5)


def serve(settings: Settings, *, keys: Sequence[PublicKey] = (),
          functions: CallFunctions = CallFunctions(),  # noqa: B008 - it is never changed
          find_call: Callable[[CallEvent], Any] | None = None,
          tell: Callable[[Replied], str] = lambda replied: "",
          announce: Callable[[Settings], str] = lambda settings: "") -> int:
    """Receive webhooks until a signal comes; return the exit status. Raises SettingsError, OSError.

    On SIGTERM, SIGHUP or Ctrl-C no connection is accepted any more, requests that were read get
    their reply, and the rest is closed; then your functions, the call log and the lines are
    finished, as far as time allows (6 s in all). stderr names the calls whose events are not
    stored, and counts the runs that are left; the status is 0 all the same.

    `keys` come before sipgate's own; `tell` gives the text to print for an event, `announce` that
    for the start.
    """
    arrived: list[int] = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it, and means it
            signal.signal(number, lambda number, frame: arrived.append(number))
    tls = None
    if settings.webhook_tls_cert or settings.webhook_tls_key:
        tls = TlsFiles(settings.webhook_tls_cert, settings.webhook_tls_key)
    with WebhookServer(settings.webhook_host, settings.webhook_port, settings.base_path,
                       tls) as server, outputs() as out:
        if settings.call_output == "json":
            sys.stdout = sys.stderr  # what your code prints: stdout is for events alone
        settings, call_log = replace(settings, webhook_port=server.port), None
        if settings.call_log != "off":
            call_log = CallLog(settings.call_log, settings.call_log_days)
        receiver = server.receiver = Receiver(
            settings, [*keys, SIPGATE_KEY], functions,
            lambda replied: out.put(lambda: tell(replied)), call_log=call_log, find_call=find_call)
        sys.stderr.write(announce(settings))

        def is_told() -> bool:
            stuck = receiver.your_code.stuck()
            if stuck:
                logger.warning("%s", stuck)
            return bool(arrived)

        server.serve_until(is_told)
        deadline = time.monotonic() + STOP_SECONDS
        server.stop(STOP_SECONDS)
        left = receiver.your_code.hooks.finish(max(deadline - time.monotonic(), 0.1))
        if left:
            logger.error("%d events for your code were left at the stop", len(left))
        if call_log:
            call_log.close(max(deadline - time.monotonic(), 0) + 1)
        logger.info("stopped")
    return 0


# ==========================================================================================
# PART II: LOOKS AT THE LOG
# Comfort. With all of it cut off, serve(settings) still starts and serves.
# ==========================================================================================

# ------------------------------------------------------------------------------------------
# Starting
# What is read and said before the first call. The environment and arguments are not read here.
# ------------------------------------------------------------------------------------------

SETTINGS = [setting.name.upper() for setting in fields(Settings)]
OURS = re.compile(rf"\s*(export\s+)?({'|'.join(SETTINGS)})\b")
# A line that sets something; in the last group that took part is the value. Or an empty line.
ENV_LINE = re.compile(r"""
    (?!.*\$\{) \s* (?:export\s+)? ([A-Za-z_][A-Za-z0-9_]*) \s* = (?!\s+\#) \s*
    (?: (?: "([^"\\\0]*)" | '([^'\\\0]*)' ) \s* (?:\#.*)?
      | ((?:[^\s'"\0][^\0]*?)?) (?:\s+\#.*)? \s* )
    | \s* (?:\#.*)?""", re.VERBOSE)


def read_env_file(path: str) -> dict[str, str]:
    """Return what a `.env` file sets. Raises SettingsError.

    A line is read only where python-dotenv makes the same of it: nothing is guessed.
    """
    try:
        lines = pathlib.Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", "save it as UTF-8 (PowerShell's > writes UTF-16)")
        raise SettingsError(f"{path} cannot be read: {why}") from None
    values = {}
    for number, line in enumerate(lines, 1):
        found = ENV_LINE.fullmatch(line)
        if not found:
            problem = (f"{path} line {number} cannot be read: expected NAME=value, quotes closed, "
                       "without ${...}, \\ or text behind them")
            if OURS.match(line):
                raise SettingsError(problem)
            logger.warning("%s; it is skipped", problem)
        elif found.lastindex:
            values[found[1]] = found[found.lastindex]
    return values


PATHS = ("WEBHOOK_TLS_CERT", "WEBHOOK_TLS_KEY", "SIGNATURE_KEY_FILE", "CALL_HANDLERS", "CALL_LOG")
PORT = "[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
URL = (rf"(?!.*(ADDRESS|SECRET-PATH|({'|'.join(ROUTES)})/*$))https?://[A-Za-z0-9._-]+"
       rf"(:(?!0)({PORT}))?(/[A-Za-z0-9/._~!$&'()*+,;=:@%-]*)?")
EXPECTED = {  # what a setting looks like, and how that is said; the others may be any text
    "WEBHOOK_URL": (
        URL, "an address such as https://example.org/3f9c2a, without /new-call, query or user"),
    "WEBHOOK_PORT": (PORT, "a whole number from 0 to 65535"),  # 0: any free one
    "VERIFY_SIGNATURE": ("on|new-call|off", "on, new-call or off"),
    "CALL_LOG_DAYS": ("[1-9][0-9]{0,4}", "a whole number from 1 to 99999"),
    "CALL_OUTPUT": ("text|json|off", "text, json or off"),
    "CALL_PAGE_KEY": ("[A-Za-z0-9_-]{16,128}", "16 to 128 letters and digits"),
}


def read_setting(name: str, text: str) -> Any:
    """Return the value of a setting; ArgumentTypeError says what was expected."""
    pattern, expected = EXPECTED.get(name, ("", ""))
    if text and pattern and not re.fullmatch(pattern, text):
        raise argparse.ArgumentTypeError(f'"{text}": expected {expected}')
    return type(getattr(Settings, name.lower()))(text.rstrip("/"))


def checked(values: Mapping[str, Any], folder: str = "") -> Settings:
    """Return the settings of `values` (name to text; empty: the default).

    A relative path counts from `folder`. SettingsError has a sentence for each wrong value.
    """
    found, problems = {}, []
    for name in SETTINGS:
        text = str(values.get(name, "")).strip() or str(getattr(Settings, name.lower()))
        if text.lower() == "off":  # and no file OFF with calls in it
            text = "off"
        elif name in PATHS and text:
            text = os.path.abspath(os.path.join(folder, text))
        try:
            found[name.lower()] = read_setting(name, text)
        except argparse.ArgumentTypeError as error:
            problems.append(f"{name} is {error}")
    if problems:
        raise SettingsError(*problems)
    settings = Settings(**found)
    if settings.trial and not is_loopback(settings.webhook_host):
        raise SettingsError(f'WEBHOOK_HOST is "{settings.webhook_host}": expected 127.0.0.1, or '
                            "WEBHOOK_URL set as well")
    return settings


def warnings_of(settings: Settings) -> Iterator[str]:
    """What is allowed but probably not meant, a sentence each."""
    url = urllib.parse.urlsplit(settings.webhook_url)
    if url.hostname and not is_loopback(url.hostname):
        if url.scheme == "http":
            yield "WEBHOOK_URL begins with http: sipgate's newer accounts take https only"
        if not url.path:
            yield ("WEBHOOK_URL has no path: only a secret one keeps out other customers of "
                   f"sipgate, such as WEBHOOK_URL={settings.webhook_url}/{os.urandom(8).hex()}")
    if url.hostname and settings.verify_signature == "off":
        yield "VERIFY_SIGNATURE=off: anyone who knows the address can invent calls"
    if time.localtime().tm_year < 2020:
        yield "the clock of this machine is wrong: set it, or calls get wrong times"


class CommandEnd(Exception):
    """The command ends here, with exit status 1; the text says why."""


class NothingToShow(CommandEnd):
    """That is no failure: the exit status is 0."""


def warn_of_slips(found: Iterable[str], names: Iterable[str]) -> None:
    """Warn of what is no name of ours, but looks like one."""
    meant = {name.upper(): name for name in names}
    for name in sorted(set(found).difference(names)):
        for close in difflib.get_close_matches(name.upper(), meant, 1, 0.8):
            logger.warning("nothing uses %s; is %s meant?", name, meant[close])


def load_functions(path: str) -> CallFunctions:
    """Run the file CALL_HANDLERS names; return its functions, and ours. Raises SettingsError."""
    if not path:
        return CallFunctions()
    wrong, names = f'CALL_HANDLERS is "{path}": ', CallFunctions._fields
    # It imports this very module, whatever the script is called.
    sys.modules["sipgate_callevents"] = sys.modules[__name__]
    try:
        module = runpy.run_path(path, run_name="call_handlers")
    except BaseException as error:  # noqa: BLE001 - sys.exit() in the file included
        lines = [f"line {frame.lineno}: " for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        raise SettingsError(
            f"{wrong}{''.join(lines[-1:])}{type(error).__name__}: {error}") from None
    warn_of_slips(module, names)
    found = {name: module[name] for name in names if name in module}
    if not found or not all(map(takes_an_event, found.values())):
        raise SettingsError(f"{wrong}expected {', '.join(names)}: one or more, as plain functions "
                            "of one argument, the event, without async")
    return CallFunctions(**found)


def takes_an_event(function: Any) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(function).bind(CallEvent())
        return not inspect.iscoroutinefunction(function)
    return False


def load_keys(path: str) -> list[PublicKey]:
    """Return the key in the file SIGNATURE_KEY_FILE names, if any. Raises SettingsError."""
    if not path:
        return []
    der = b""
    with contextlib.suppress(OSError, ValueError):
        text = pathlib.Path(path).read_text("ascii", "replace")
        in_base64 = text.partition("-----BEGIN PUBLIC KEY-----")[2].partition("-----END")[0]
        der = base64.b64decode(in_base64)
    # With 2048 bits it has 294 bytes; around the modulus it is as sipgate's key but for lengths.
    if len(der) < 294 or (der[4:19], der[32:33], der[-5:]) != (_DER[4:19], b"\0", _DER[-5:]):
        raise SettingsError(f'SIGNATURE_KEY_FILE is "{path}": expected a PEM file with an RSA key '
                            'of at least 2048 bits ("BEGIN PUBLIC KEY")')
    return [PublicKey(int.from_bytes(der[33:-5], "big"), 65537)]


TRIAL_TEXT = """\
Trial mode proves nothing: any program on this machine can invent calls.
For a first real call, book sipgate.io, then open a tunnel in a second terminal:
  ssh -R 80:127.0.0.1:{0.webhook_port} nokey@localhost.run
and restart this program with the address it prints and a secret path:
  --url https://ADDRESS/{1}
"""
LIVE_TEXT = """\
At https://console.sipgate.com, under Webhooks > URLs, enter for incoming or
outgoing calls (and choose the phone lines and groups under Webhooks > Sources):
  {0.webhook_url}/new-call
"""


def announcement(settings: Settings) -> str:
    """What a person needs next, now that the server listens."""
    text = f"sipgate_callevents listens on {settings.webhook_host} port {settings.webhook_port}\n"
    text += (TRIAL_TEXT if settings.trial else LIVE_TEXT).format(settings, os.urandom(8).hex())
    for name in ("VERIFY_SIGNATURE", *PATHS, "CALL_LOG_DAYS"):
        value = getattr(settings, name.lower())
        text += f"{name} is {value}\n" if value else ""
    return text + "Ctrl-C stops.\n"


# ------------------------------------------------------------------------------------------
# Showing events
# What is printed for an event, once it has its reply.
# ------------------------------------------------------------------------------------------

def described(document: bytes) -> str:
    """The action in a reply's XML in a few words, such as "Dial Voicemail"; "" without one."""
    words = []
    for element in ET.fromstring(document).iterfind(".//*"):
        words += [element.text or element.tag, element.get("reason", "")]
    return " ".join(filter(None, words))


def rfc3339(moment: float) -> str:
    """Unix time as RFC 3339 in UTC, with milliseconds."""
    utc = datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)  # noqa: UP017
    return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def local_time(moment: float) -> str:
    """Unix time as people here write it: 2026-11-26 15:46:00."""
    return str(datetime.datetime.fromtimestamp(int(moment)))


def duration(seconds: float) -> str:
    """Seconds as 1:32, or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def event_line(event: CallEvent, call: Any = None) -> str:
    """The sentence that is printed for an event; `call` saves looking for its Call."""
    def known(text: str) -> str:
        return text or "[unknown]"

    if isinstance(event, NewCallEvent):
        line = f"New call from {known(event.from_number)} to {known(event.to_number)} is ringing..."
    elif isinstance(event, AnswerEvent):
        who = known(event.user or event.answering_number)
        line = f"{who} answered call from {known(event.from_number)}"
    elif isinstance(event, HangupEvent):
        remarks = ", ".join(filter(None, (event.cause, outcome_text(call or event.call))))
        line = "The call has been hung up" + (f" ({remarks})" if remarks else "")
    elif isinstance(event, DtmfEvent):
        caller = getattr(call or event.call, "from_number", "")
        line = f"{known(caller)} pressed {known(event.dtmf)}"
    else:
        line = f"Unknown event {event.event}"
    return printable(line)


def outcome_text(call: Call | None) -> str:
    """How a call went, in a few words; "" while that is not known."""
    if not call or call.ended is None:
        return ""
    if call.talk_s is not None:
        return f"talked {duration(call.talk_s)}"
    return call.outcome + ("" if call.wait_s is None else f" after {duration(call.wait_s)}")


def event_json(event: CallEvent, received_at: float, reply: str = "") -> dict[str, Any]:
    """An event in sipgate's field names, for JSON."""
    entry: dict[str, Any] = {"received_at": rfc3339(received_at), "event": event.event}
    if isinstance(event, NewCallEvent):
        entry.update(user=event.users, userId=event.user_ids, fullUserId=event.full_user_ids)
    for key, values in event.fields.items():
        if key.partition("[")[0] not in entry:
            entry[key] = values[0] if len(values) == 1 else values
    return {**entry, "reply": reply} if reply else entry


def told(replied: Replied, form: str, with_time: bool) -> str:
    """What is printed for an event, in the form that CALL_OUTPUT names."""
    reply = described(replied.reply.body) if replied.action else ""
    if form == "off":
        return ""
    if form == "json":
        return json.dumps(event_json(replied.event, replied.received_at, reply)) + "\n"
    moment = local_time(replied.received_at) + " " if with_time else ""
    further = f"{moment}Replied with {reply}\n" if reply else ""
    return f"{moment}{event_line(replied.event)}\n{further}"


# ------------------------------------------------------------------------------------------
# Calls
# From the stored events of legs to calls as people see them, whenever somebody asks: nothing
# that is derived is kept. Every step is bounded, so that no odd event holds up a reader.
# ------------------------------------------------------------------------------------------

LINK_EVENTS = 300  # an xcid or origCallId in more events than that joins nothing
CALL_EVENTS = 1500  # of one call
FORWARD_SECONDS = 60  # after the end of a leg, in which the next one begins
RINGING_LOST_SECONDS = 3600  # after its last event, a call whose end was not reported is lost
TALKING_LOST_SECONDS = 12 * 3600  # people do talk for seven hours; a leg joins no later, too
FORGOTTEN = "[forgotten]"  # stands in place of what `forget` has removed
# What tells most comes first. A repeat changes nothing, but a digit pressed twice does.
LEG_ROWS = """SELECT min(id), event, body, orig_call_id, xcid
    FROM (SELECT * FROM events WHERE {} = ? ORDER BY event = 'dtmf', id LIMIT ?)
    GROUP BY event, body, id * (event IN ('dtmf', 'reply'))"""
LINKED_LEGS = f"""SELECT call_id FROM events WHERE orig_call_id = ?
    UNION ALL SELECT call_id FROM events WHERE xcid = ? LIMIT {LINK_EVENTS + 1}"""


@dataclass(frozen=True)
class Call:
    """A phone call over all its legs. Times are Unix times of ours, None where not known (yet).

    `outcome`: ringing, talking, answered, voicemail, missed, unanswered, rejected, lost.
    """

    direction: str
    from_number: str
    to_number: str
    users: tuple[str, ...]  # whose phones rang
    answered_by: tuple[str, ...]  # everyone who spoke with the other side
    started: float
    answered: float | None
    ended: float | None
    wait_s: float | None
    talk_s: float | None
    outcome: str
    cause: str
    digits: str  # those pressed, joined by commas
    reply: str  # our last action, in words
    legs: tuple[str, ...]


def key_of(call: Call) -> str:
    """The name of its first leg."""
    return call.legs[0] if call.legs else f"#{call.started * 1e6:.0f}"


class StoredEvent(NamedTuple):
    """A row of the call log, with its Unix time; `words`: what our reply said, if it is one."""

    at: float
    event: Any
    words: str = ""


class Leg:
    """The events of one callId, earliest first; or of none, then `name` is # and an id."""

    def __init__(self, name: str, rows: Iterable[Any]) -> None:
        numbers, kinds, bodies, origs, xcids = zip(*sorted(rows))
        self.name, self.origs, self.xcids = name, set(origs) - {None}, set(xcids) - {None}
        self.stored = [
            StoredEvent(number / 1e6, CallEvent(event=kind), described(body))
            if kind == "reply" else StoredEvent(number / 1e6, parse_event(body, kind))
            for number, kind, body in zip(numbers, kinds, bodies)]
        self.begun, self.last_at = self.stored[0].at, self.stored[-1].at
        self.new_calls = events_of([self], NewCallEvent)
        self.hangup = next(iter(events_of([self], HangupEvent)), None)
        self.direction = self.text("direction")
        self.rang = [user for entry in self.new_calls for user in entry.event.users if user]
        answers = events_of([self], AnswerEvent)
        self.voicemails = [answer for answer in answers if self.is_voicemail(answer)]
        self.people = [answer for answer in answers if answer not in self.voicemails]

    def text(self, name: str) -> str:
        """The attribute `name` of the newCall, else of the first event that has it."""
        texts = (getattr(entry.event, name, "") for entry in self.new_calls[:1] + self.stored)
        return next(filter(None, texts), "")

    def is_voicemail(self, answer: StoredEvent) -> bool:
        """Whether it says so, or names nobody and nothing else rang, or we sent it there."""
        if answer.event.user:
            return bool(answer.event.user == "voicemail")
        replies = [entry.words for entry in self.stored if entry.words and entry.at < answer.at]
        return set(self.rang) == {"voicemail"} or replies[-1:] == ["Dial Voicemail"]


def events_of(legs: Iterable[Leg], kind: type[CallEvent] = CallEvent) -> list[StoredEvent]:
    """The events of these legs that are of that kind, earliest first."""
    return sorted(entry for leg in legs for entry in leg.stored if isinstance(entry.event, kind))


def put_together(legs: Sequence[Leg], now: float) -> Call:
    """Return the call that these legs, earliest first, make up, as it stands at `now`."""
    named = {orig for leg in legs for orig in leg.origs}
    first = min(legs, key=lambda leg: leg.name not in named)
    begun = events_of(legs, NewCallEvent)[0].at if first.new_calls else None
    spoken = speakers(legs, first)
    answered, ended = spoken[0][0] if spoken else None, end_of(legs, now)
    voicemails = [answer.at for leg in legs for answer in leg.voicemails]
    waited = answered or min(voicemails, default=ended)
    talked = min((at for at in voicemails if answered and at > answered), default=ended)
    causes = [hangup.event.cause for hangup in events_of(legs, HangupEvent)]
    causes.sort(key=lambda cause: cause != "forwarded")  # the latest other one is the last
    reply = next((entry.words for entry in reversed(events_of(legs)) if entry.words), "")
    outcomes = {  # the first that is so
        "voicemail": voicemails and not spoken,
        "rejected": reply.startswith(("Reject", "Hangup")) and not spoken,
        "lost": now >= _lost_at(legs) if ended is None else not (spoken or first.new_calls),
        "talking": spoken and ended is None,
        "ringing": ended is None,
        "answered": spoken,
        "unanswered": first.direction == "out",
        "missed": True}
    return Call(
        direction=first.direction, from_number=first.text("from_number"),
        to_number=first.text("to_number"),
        users=tuple(dict.fromkeys(
            user for leg in legs for user in leg.rang if user != "voicemail")),
        answered_by=tuple(dict.fromkeys(name for _, name in spoken if name)),
        started=begun or legs[0].begun, answered=answered, ended=ended,
        wait_s=begun and waited and max(waited - begun, 0.0),
        talk_s=answered and talked and max(talked - answered, 0.0),
        outcome=next(outcome for outcome, is_so in outcomes.items() if is_so),
        cause=causes[-1] if causes else "", reply=reply,
        digits=",".join(pressed.event.dtmf for pressed in events_of(legs, DtmfEvent)
                        if pressed.event.dtmf not in ("", "-1")),
        legs=tuple(leg.name for leg in legs if not leg.name.startswith("#")))


def speakers(legs: Sequence[Leg], first: Leg) -> list[tuple[float, str]]:
    """Who spoke with the other side, as (time, name).

    A name outranks a number; a queue, or whoever answered at the number called, is nobody.
    """
    names, numbers, nobody = [], [], []
    called = {"", *map(first.text, ("from_number", "to_number", "diversion"))}
    is_outgoing, has_voicemail = first.direction == "out", any(leg.voicemails for leg in legs)
    for leg in legs:
        for at, event, _ in leg.people:
            number = event.answering_number or event.to_number
            if event.user and not (is_outgoing and leg is first):
                names.append((at, event.user))
            elif leg.direction == "out" and first.direction == "in":
                names.append((at, number))  # a colleague put the caller through to it
            elif number not in called and not is_outgoing:
                numbers.append((at, number))
            elif is_outgoing or not has_voicemail:
                nobody.append((at, ""))
    return sorted(names or numbers or nobody)


def end_of(legs: Sequence[Leg], now: float) -> float | None:
    """When the call of these legs, earliest first, ended; None if it goes on, or is not known."""
    last: StoredEvent | None = None
    for leg in reversed(legs):
        if leg.hangup:
            last = max(last or leg.hangup, leg.hangup)
        elif last and (not leg.people or now - last.at >= RINGING_LOST_SECONDS):
            continue  # it was passed on, and its hangup is lost
        elif leg.people or not leg.voicemails:  # voicemail's own is not waited for
            return None
    if not last or last.event.cause == "forwarded" and now - last.at < FORWARD_SECONDS:
        return None
    return last.at


def _lost_at(legs: Sequence[Leg]) -> float:
    patience = TALKING_LOST_SECONDS if events_of(legs, AnswerEvent) else RINGING_LOST_SECONDS
    return max(leg.last_at for leg in legs) + patience


def linked_legs(database: sqlite3.Connection, name: str) -> Iterator[Leg]:
    """Yield the leg, and all that links join with it, whatever time lies between them."""
    waiting, seen, room = [name or "#"], {name, ""}, CALL_EVENTS
    while waiting and room:
        each = waiting.pop()
        column = "id" if each.startswith("#") else "call_id"
        rows = database.execute(LEG_ROWS.format(column), (each.lstrip("#"), room)).fetchall()
        if not rows:
            continue
        leg = Leg(each, rows)
        yield leg
        if column == "id":
            return  # without a callId it is a call of its own
        room -= len(rows)
        more: set[str] = set()
        for link in {each} | (leg.origs | leg.xcids) - seen:
            found = database.execute(LINKED_LEGS, (link, link)).fetchall()
            if len(found) <= LINK_EVENTS:
                # Others that name the same orig are linked once that has come itself.
                more.update([link], *(found if link not in leg.origs else []))
        waiting += sorted(more - seen)
        seen |= more


def is_of_same_call(leg: Leg, call: Sequence[Leg]) -> bool:
    """Whether `leg`, which began later, is one of the same call as the legs in `call`."""
    if leg.begun - call[0].begun > DAY:
        return False  # or odd links would make one endless call
    if any((other.name in leg.origs or leg.name in other.origs)
           and leg.begun - other.last_at <= TALKING_LOST_SECONDS for other in call):
        return True
    over_at = end_of(call, leg.begun) or _lost_at(call)
    return leg.begun <= over_at + FORWARD_SECONDS and any(leg.xcids & other.xcids for other in call)


def call_with(database: sqlite3.Connection, name: str, until: float = math.inf) -> list[Leg]:
    """The legs, earliest first, of the call that the leg of that name is part of.

    Raises TimeoutError past `until` (time.monotonic()).
    """
    calls: list[list[Leg]] = []
    for leg in sorted(linked_legs(database, name), key=lambda leg: leg.begun):
        if time.monotonic() > until:
            raise TimeoutError
        same = [call for call in calls if is_of_same_call(leg, call)]
        calls = [call for call in calls if call not in same]
        calls.append(sorted(itertools.chain(*same, [leg]), key=lambda leg: leg.begun))
    return next((call for call in calls if any(leg.name == name for leg in call)), [])


def latest_first(database: sqlite3.Connection, columns: str, since: float = 0.0) -> Iterator[Any]:
    """Yield the rows since a Unix time, the latest first; `columns` begin with id."""
    rows: list[Any] = [(1 << 62,)]
    while rows:  # in pieces: a transaction that stays open would keep -wal from being emptied
        rows = database.execute(f"SELECT {columns} FROM events WHERE id < ? AND id >= ? "
                                "ORDER BY id DESC LIMIT 500", (rows[-1][0], since * 1e6)).fetchall()
        yield from rows


def listed_calls(database: sqlite3.Connection, now: float, since: float = 0.0
                 ) -> Iterator[tuple[Call, list[Leg]]]:
    """Yield each call with an event since a Unix time, and its legs, the latest first."""
    seen: set[str] = set()
    for number, call_id in latest_first(database, "id, call_id", since):
        name = call_id or f"#{number}"
        legs = call_with(database, name) if name not in seen else []
        seen.update(leg.name for leg in legs)
        if legs:
            yield put_together(legs, now), legs


def bare_number(text: str) -> str:
    """A number without all that is no part of it, such as + or 00 before its country code."""
    digits = re.sub(r"\(\s*0\s*\)|[\s()/.-]|\A(sip|tel):|@.*", "", text)
    return re.sub(r"\A(\+|00)", "", digits)


def to_ring_back(calls: Iterable[Call]) -> tuple[list[list[Call]], int]:
    """Those of `calls`, latest first, to ring back, a list for each number; how many had none."""
    spoken: set[str] = set()
    callers: dict[str, list[Call]] = {}
    withheld = 0
    for call in calls:
        is_out = call.direction == "out"
        number = bare_number(call.to_number if is_out else call.from_number)
        # What has no direction is the remains of a call.
        is_lost = call.outcome == "lost" and call.direction and not (call.answered or call.ended)
        if call.answered and (call.answered_by or is_out):
            spoken.add(number)
        elif is_out or not (is_lost or call.outcome in ("missed", "voicemail")):
            continue
        elif number in ("", "anonymous", FORGOTTEN):
            withheld += 1
        elif number not in spoken:
            callers.setdefault(number, []).append(call)
    return list(callers.values()), withheld


# ------------------------------------------------------------------------------------------
# Showing calls, and forgetting a number
# The commands `calls` and `forget`. They create no log, and hold up no server for long.
# ------------------------------------------------------------------------------------------

CALL_SECONDS = 0.2  # for looking up an event's call
# What a table shows of a row, and its heading.
COLUMNS = {"started": "STARTED", "direction": "", "from": "FROM", "to": "TO", "calls": "TIMES",
           "outcome": "OUTCOME", "wait_s": "WAIT", "talk_s": "TALK", "answered_by": "BY"}


@contextlib.contextmanager
def open_log(path: str, timeout: float = 5.0) -> Iterator[sqlite3.Connection]:
    """The call log at `path`; `timeout`: seconds to wait for a lock. Raises CommandEnd."""
    # Never opened but by SQLite: closing a file drops the locks of the whole process on it.
    try:
        is_empty = path == "off" or not os.stat(path).st_size
    except OSError as error:  # or its folder is closed to this user
        is_empty = isinstance(error, FileNotFoundError)
    if is_empty:
        raise NothingToShow(f"no calls are kept yet (CALL_LOG={path})")
    if not os.access(path, os.R_OK | os.W_OK):
        raise CommandEnd(f"this user may not open {path}; as root: " + shlex.join(
            ["sudo", "env", f"CALL_LOG={path}", sys.executable, *sys.argv]))
    uri = pathlib.Path(path).as_uri() + "?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(
                uri, uri=True, timeout=timeout, isolation_level=None)) as database:
            marks = database.execute("SELECT * FROM pragma_application_id, pragma_user_version")
            if marks.fetchone() != (APPLICATION_ID, SCHEMA_VERSION):
                raise CommandEnd(f"{path} is not a call log of this version of the program")
            yield database
    except sqlite3.Error as error:
        raise CommandEnd(f"{path}: {error}") from None


def find_call(path: str, event: CallEvent) -> Call | None:
    """The call of an event; None where finding it takes over CALL_SECONDS."""
    until = time.monotonic() + CALL_SECONDS
    with contextlib.suppress(CommandEnd, TimeoutError), open_log(path, CALL_SECONDS) as database:
        database.set_progress_handler(lambda: time.monotonic() > until, 1000)
        legs = call_with(database, event.call_id, until)
        return put_together(legs, time.time()) if legs else None
    return None


def call_row(call: Call, legs: Iterable[Leg] = (), form: str = "") -> dict[str, Any]:
    """A call as a row; None is not known. With its events, if these have a form."""
    row = {name.replace("_number", ""): None if value == "" else value
           for name, value in vars(call).items()}
    if form:
        row["events"] = [
            event_json(event, at, words) if form == "json" else printable(
                f"  {local_time(at)[11:]} {event.event:7} {words or event_line(event, call)}")
            for at, event, words in events_of(legs)]
    return row


def readable(name: str, value: Any, form: str) -> Any:
    """A value of a row in that form; a float in _s is seconds, any other a Unix time."""
    if isinstance(value, float) and name.endswith("_s"):
        return duration(value) if form == "table" else int(value)
    if isinstance(value, float):
        moment = rfc3339(value) if form == "json" else local_time(value)
        return moment[5:16] if form == "table" else moment
    if form == "json" or isinstance(value, int):
        return value
    text = printable(value if isinstance(value, str) else ", ".join(value or ()))
    if form == "table":
        return re.sub(r"\A(?=[1-9][0-9]{6,}\Z)", "+", text)
    # A spreadsheet would take it for a formula, or a number to be rounded.
    return re.sub(r"\A(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20\d])", "'", text)


def table(rows: Iterable[Any]) -> str:
    """Rows as lines that fit the terminal, or 80 columns, and their events."""
    rows = [COLUMNS, *sorted(rows, key=lambda row: row["started"])]
    names = [name for name in COLUMNS if name in rows[-1]]
    cells = [[str(readable(name, row[name], "table")) for name in names] for row in rows]
    most = max(shutil.get_terminal_size().columns, 80)
    widest = (most - 48) // 2  # two numbers beside all else: 16 in 80 columns, as E.164 needs
    widths = [min(max(map(len, column)), widest) for column in zip(*cells)][:-1] + [most]
    lines = []
    for texts, row in zip(cells, rows):
        line = " ".join(text[:width].ljust(width) for text, width in zip(texts, widths))
        lines += [line[:most].rstrip(), *row.get("events", ())]
    return "\n".join(lines)


def write_rows(rows: Iterable[Any], form: str, stream: TextIO) -> None:
    """Write rows as they come, as json, csv or excel: CSV as a German Excel reads it."""
    writer = csv.writer(stream, lineterminator="\n", delimiter=";" if form == "excel" else ",")
    for number, row in enumerate(rows):
        values = {name: readable(name, value, form) for name, value in row.items()}
        if form == "json":
            stream.write(json.dumps(values) + "\n")
            continue
        if number == 0:
            stream.write("\ufeff" if form == "excel" else "")
            writer.writerow(values)  # the names
        writer.writerow(values.values())


def read_since(text: str) -> float:
    """The Unix time at which a day begins. Raises SettingsError."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise SettingsError(f'--since is "{text}": expected a date such as 2026-11-01') from None


def has_number(call: Call, legs: Iterable[Leg], wanted: str) -> bool:
    """Whether a call or a leg of it has this number, in which * is any digits."""
    numbers = [call.from_number, call.to_number]
    for name in ("from_number", "to_number", "diversion", "answering_number"):
        numbers += [leg.text(name) for leg in legs]
    return bool(fnmatch.filter(map(bare_number, numbers), bare_number(wanted)))


def show_calls(options: argparse.Namespace, settings: Settings) -> int:
    """The command `calls`."""
    since, form, withheld = read_since(options.since), options.format, 0
    times: dict[Call, int] = {}  # how often who made this call, their latest one, has called
    with open_log(settings.call_log) as database:
        pairs = listed_calls(database, time.time(), since)
        if options.missed:
            callers, withheld = to_ring_back(call for call, _ in pairs)
            missed: Iterable[Call] = itertools.chain(*callers)
            if not options.all:
                missed = times = {calls[0]: len(calls) for calls in callers}
            latest = sorted(missed, key=lambda call: call.started, reverse=True)
            needs_legs = options.events or options.number != "*"
            pairs = ((call, call_with(database, key_of(call)) if needs_legs else [])
                     for call in latest)
        rows = ({**call_row(call, legs, form if options.events else ""),
                 **({"calls": times[call]} if times else {})}
                for call, legs in pairs
                if call.started >= since and has_number(call, legs, options.number))
        if form != "table":
            write_rows(itertools.islice(rows, options.limit), form, sys.stdout)
            return 0
        limit = options.limit or 20
        shown = list(itertools.islice(rows, limit))
        print(table(shown) if shown else "no call matches")
        if next(rows, None):
            print(f"These are the latest {limit}; --limit N shows more.")
    if withheld:
        print(f"and {withheld} with no number")
    return 0


def rows_without(database: sqlite3.Connection, number: str) -> Iterator[Any]:
    """Yield each stored row that holds the number, but for the values that do."""
    tokens: dict[str, str] = {}  # for ids: what is joined stays joined, and nothing else

    def blank(text: Any) -> Any:
        return FORGOTTEN if text and re.search(number, urllib.parse.unquote_plus(text)) else text

    def blank_id(text: Any) -> Any:
        word = f"[forgotten {os.urandom(4).hex()}]"
        return text if blank(text) == text else tokens.setdefault(text, word)

    for row in latest_first(database, "id, event, call_id, orig_call_id, xcid, body"):
        # In XML a value stands between brackets or quotes, in a form beside the first =.
        value = "[^<>\"']+" if row[1] == "reply" else "(?<==)[^&]+|[^&=]+"
        text = re.sub(value, lambda found: blank(found[0]), row[5].decode("latin-1"))
        kept = (row[0], blank(row[1]), *map(blank_id, row[2:5]), text.encode("latin-1"))
        if kept != row:
            yield kept


def similar(database: sqlite3.Connection, digits: str) -> str:
    """Stored numbers that end in these digits."""
    ending = rf"\b[1-9][0-9]*{digits.lstrip('0')}\b"
    found = {number for _, body in latest_first(database, "id, body")
             for number in re.findall(ending, urllib.parse.unquote_plus(body.decode("latin-1")))}
    return ", ".join(sorted(found)[:5])


def holding(names: Iterable[str], number: str) -> list[str]:
    """Those of the files whose bytes hold the number."""
    found = []
    for name in filter(os.path.exists, names):
        # In lines, which are short: the pages of SQLite begin with CR or LF.
        with open(name, encoding="latin-1") as file:
            if any(re.search(number, urllib.parse.unquote_plus(line)) for line in file):
                found.append(name)
    return found


def erase(path: str, number: str) -> None:
    """Blank the number in all rows, and remove what SQLite keeps of them."""
    with open_log(path) as database:
        # NORMAL, or each row would wait for the disk.
        database.executescript("PRAGMA secure_delete=ON; PRAGMA synchronous=NORMAL")
        for row in rows_without(database, number):
            # No digest: by it a guess at the number could be tried.
            database.execute("REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?, NULL)", row)
            time.sleep(0.0001)  # so that a running server gets its turn
        rewrite(database, os.path.dirname(path))
        database.execute(EMPTY_WAL)


def forget_number(options: argparse.Namespace, settings: Settings) -> int:
    """The command `forget`: every trace of a number leaves the files."""
    path, digits = os.path.realpath(settings.call_log), bare_number("".join(options.number))
    if not re.fullmatch("[0-9]{3,32}", digits):
        raise SettingsError(f'"{digits}": expected a complete number, such as +49 157 91234567')
    # However written, but in no longer one.
    number = r"(?<![0-9])(?:00)?" + r"(?:\(0\)|[\s()/.#*+_-])*".join(digits) + "(?![0-9])"
    files = [*glob.glob(glob.escape(path) + ".damaged-*"), path, path + "-wal"]
    with open_log(settings.call_log) as database:
        # When each call began, by its first leg, as far as one event tells.
        begun = {row[3] or row[2] or row[0]: local_time(row[0] / 1e6)[:16]
                 for row in rows_without(database, number)}
        hint = "" if begun else similar(database, digits)
    if not begun and not holding(files, number):
        raise CommandEnd(f"no call holds {digits}; with the country code? {hint}".rstrip())
    times = sorted(begun.values()) or ["-"]
    calls = "1 call" if len(begun) == 1 else f"{len(begun)} calls"
    print(f"{digits} is in {calls}, from {times[0]} to {times[-1]}.")
    if not options.yes:
        print("Forget it? The calls stay. (yes/no)", flush=True)
        if not sys.stdin.readline().startswith("y"):
            raise CommandEnd("nothing was changed")
    erase(path, number)
    for name in holding(files, number):
        if name in (path, path + "-wal"):
            raise CommandEnd(f"{digits} is still in {name}: end what else reads it, and try again")
        os.remove(name)
        print(f"{name} held it, and is removed.")
    print(f"It is gone from {path}. It may still be in backups,\nin the journal or file that "
          "stdout goes to, and where your functions put it.")
    return 0


# ------------------------------------------------------------------------------------------
# Rehearsal
# The command `simulate`: plays sipgate in trial mode towards a Receiver of its own, follows the
# URLs of its replies, obeys its actions, and leaves nothing behind.
# ------------------------------------------------------------------------------------------

SCENARIOS = {  # of each leg who answers it, or behind a dash why it ends without that
    "answered": "Alice",
    "missed": "-cancel",
    "busy": "-busy",
    "declined": "-noAnswer",
    "outgoing": "Alice",
    "voicemail": "-forwarded voicemail",
    "transfer": "Alice Carl",
    "menu": "Alice",
}
REFUSALS = {"Hangup": "normalClearing", "Reject": "noAnswer"}  # actions, and the usual cause


def post_event(receiver: Receiver, url: str, form: Mapping[str, Any]) -> ET.Element:
    """Send an event as sipgate does, and print what is said; return the <Response>, if any."""
    body = urllib.parse.urlencode(form, doseq=True, errors="replace").encode()
    event = receiver.admit(url[len(receiver.settings.base_url):], body)
    # Of a copy: event.call is looked up once, for your functions when the event is stored.
    print(f"--> {event.event:8} {event_line(replace(event))}", flush=True)
    replied = receiver.reply_to(event, time.monotonic() + receiver.reply_seconds)
    text = replied.reply.body.decode().strip()
    print(wrapped(f"<-- {text}", sys.stdout, 4), flush=True)
    if "<Url>" in text and ".wav" not in text.lower():
        print("    (is the sound a WAV file? sipgate plays no other)")
    receiver.follow(replied)
    while receiver.your_code.hooks.items:
        if receiver.your_code.stuck():
            raise CommandEnd(receiver.your_code.stuck())
        time.sleep(0.005)
    return ET.fromstring(text if event.is_decided else "<Response />")


def press_keys(receiver: Receiver, reply: ET.Element, call_id: str, keys: list[str]) -> ET.Element:
    """Obey each Gather with digits taken from `keys`; return what follows, or the <Response>."""
    action = next(iter(reply), reply)
    ours = receiver.settings.base_url + "/on-data"
    while keys and action.get("onData", "").partition("?")[0] == ours:
        if "on_dtmf" not in receiver.your_code.functions:
            print("    (on_dtmf does nothing with the digits)")
        most = int(action.get("maxDigits", "")) if keys[0] != "-1" else None
        form = {"event": "dtmf", "dtmf": keys.pop(0)[:most], "callId": call_id}
        reply = post_event(receiver, action.attrib["onData"], form)
        action = next(iter(reply), reply)
    return action if keys else ET.Element("Hangup")


def rehearse(receiver: Receiver, scenario: str, options: argparse.Namespace) -> None:
    """Play a scenario towards `receiver`, as far as its replies let it happen."""
    print(f"\n{scenario}")
    call_id, to, talking = os.urandom(32).hex(), options.to, []
    for leg, plan in zip(("", "B"), SCENARIOS[scenario].split()):
        user, _, cause = plan.partition("-")
        form = {"direction": "out" if scenario == "outgoing" else "in", "from": options.sender,
                "to": to, "diversion": to if leg else "",
                "callId": call_id + leg, "origCallId": call_id}
        reply = post_event(receiver, receiver.settings.base_url + "/new-call", {
            "event": "newCall", **form, "user[]": [user] if leg else ["Alice", "Bob"]})
        keys = [*options.digits.split(","), "-1"]  # which says that the caller hung up
        action, number = press_keys(receiver, reply, call_id + leg, keys), to
        if scenario == "menu" and any(keys[:-1]) and not action.get("onData"):
            print(f"    (your functions do not ask for {','.join(keys[:-1])})")
        if action.tag == "Dial":
            number = action.findtext("Number", "")
            user = "" if number else "voicemail"
        if action.tag in REFUSALS:
            cause = action.get("reason", REFUSALS[action.tag])
        answer = {"event": "answer", **form, "user": user, "answeringNumber": number}
        hangup = {"event": "hangup", **form, "cause": cause or "normalClearing"}
        if cause:
            post_event(receiver, reply.attrib["onHangup"], hangup)
        else:
            post_event(receiver, reply.attrib["onAnswer"], answer)
            talking.append((reply.attrib["onHangup"], hangup))
        if action.tag in REFUSALS:
            break  # what our reply has ended is not passed on
    for url, hangup in talking:
        post_event(receiver, url, hangup)


def _check_sound(path: str) -> int:
    expected, found = "1 channels, 2 bytes a sample, 8000 Hz", "not a PCM WAV file"
    with contextlib.suppress(wave.Error, EOFError), wave.open(path, "rb") as sound:
        found = "{} channels, {} bytes a sample, {} Hz".format(*sound.getparams())
    verdict = "plays it" if found == expected else f"skips it: {found}, expected {expected}"
    print(wrapped(f"{path}: sipgate {verdict}", sys.stdout))
    return int(found != expected)


def simulate(options: argparse.Namespace, settings: Settings) -> int:
    """The command `simulate`; the exit status is 1 if anything went wrong."""
    if options.sound:
        return _check_sound(options.sound)
    functions = load_functions(settings.call_handlers)
    print("Your functions really run:", settings.call_handlers or "those in this script")
    messages = io.StringIO()
    with diagnostics(messages), tempfile.TemporaryDirectory() as folder:
        log = CallLog(os.path.join(folder, "calls.db"), 1)
        receiver = Receiver(Settings(), [], functions, call_log=log,
                            find_call=functools.partial(find_call, log.path))
        for scenario in SCENARIOS if options.all else [options.scenario]:
            rehearse(receiver, scenario, options)
            with open_log(log.path) as database:
                call, _ = next(listed_calls(database, time.time()))
            print(table([call_row(call)]))
        log.close(5)
    return 1 if messages.getvalue() else 0


# ------------------------------------------------------------------------------------------
# Check
# The command `check`: all that stands between a call and its line on the screen, one line each.
# A finding is a pair: "ok", "warning" or "problem", and a sentence.
# ------------------------------------------------------------------------------------------

GET_SECONDS = 10.0  # for one answer from the network, however slowly it drips


class Health(NamedTuple):
    """What a GET found."""

    kind: str  # as of a finding
    trouble: str  # "" if there is none
    instance: str = ""  # of the copy of this script that replied


def _fetch(url: str, context: ssl.SSLContext | None) -> Health:
    try:
        parts = urllib.parse.urlsplit(url)
        link = http.client.HTTPConnection(parts.netloc, timeout=GET_SECONDS)
        if parts.scheme == "https":
            link = http.client.HTTPSConnection(parts.netloc, timeout=GET_SECONDS, context=context)
        with contextlib.closing(link):
            link.request("GET", parts.path)
            reply = link.getresponse()
            text = reply.read(200).decode("latin-1").strip()
    except ConnectionRefusedError as error:
        return Health("warning", str(error))
    except Exception as error:  # noqa: BLE001 - whatever the network makes of it
        return Health("problem", str(error))
    instance, refused = reply.headers.get("X-Instance", ""), reply.headers.get("X-Refused", "0")
    if not instance:
        return Health("problem", f"status {reply.status}")
    if reply.status == 503:
        return Health("problem", text, instance)
    if refused != "0":
        trouble = f"webhooks were refused ({refused}): the server's stderr says why"
        return Health("warning", trouble, instance)
    return Health("ok", "", instance)


def get_health(url: str, context: ssl.SSLContext | None = None) -> Health:
    """GET `url`, for GET_SECONDS at most. Raises nothing."""
    found = [Health("problem", "timed out")]
    thread = threading.Thread(target=lambda: found.append(_fetch(url, context)), daemon=True)
    thread.start()
    thread.join(GET_SECONDS)
    return found[-1]


def local_health(settings: Settings) -> Health:
    """The health of the copy of this script that runs here with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.webhook_host, settings.webhook_host)
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.webhook_tls_cert else "http"
    # Our own, on this machine: its certificate is for another name.
    return get_health(f"{scheme}://{host}:{settings.webhook_port}{settings.base_path}/healthz",
                      ssl._create_unverified_context())


def _check_log(path: str) -> tuple[str, str]:
    try:
        with open_log(path) as database:
            last_id, = next(latest_first(database, "id"), (0,))
    except NothingToShow as error:
        if path == "off" or os.access(os.path.dirname(path), os.W_OK):
            return "ok", f"call log: {error}"
        return "problem", f"call log: {error}, and this user may not create it"
    except CommandEnd as error:
        return "problem", f"call log: {error}"
    if not last_id:
        return "warning", f"call log {path}: no event yet: are URL and sources set at sipgate?"
    return "ok", f"call log {path}: the last event came on {local_time(last_id / 1e6)}"


def _check_port(settings: Settings, health: Health) -> tuple[str, str]:
    said = f"the running copy says: {health.trouble or 'ok'}"
    if not health.instance:
        said = (f"no server with these settings answers ({health.trouble}): start it, or give "
                "check the settings of the running copy (--env-file)")
    return health.kind, f"port {settings.webhook_port} of {settings.webhook_host}: {said}"


def _check_way_in(url: str, instance: str) -> tuple[str, str]:
    if not url:
        return "warning", ("without WEBHOOK_URL sipgate cannot reach the running copy; if it has "
                           "one, give check its settings (--env-file)")
    for route in ROUTES:
        health = get_health(url + route)
        if health.instance != instance:
            # From inside, a router may not be able to reach its own public address.
            kind = "warning" if health.trouble.endswith("timed out") else "problem"
            return kind, (f"{url}{route} does not lead here ({health.trouble or 'another copy'}): "
                          "does the tunnel or proxy run, with a valid certificate, and lead to "
                          "this port, path included (nginx: no slash at the end of proxy_pass)?")
    return "ok", f"{url} leads to the running copy, with each of its paths"


def check(options: argparse.Namespace, settings: Settings) -> int:
    """The command `check`; the exit status is 1 if there is a problem."""
    kinds = []

    def say(kind: str, text: str) -> None:
        kinds.append(kind)
        print(wrapped(f"{kind:8} {printable(text)}", sys.stdout, 9), flush=True)

    say("ok", f"settings: {options.sources}")
    for warning in warnings_of(settings):
        say("warning", warning)
    try:
        load_keys(settings.signature_key_file)
        if settings.webhook_tls_cert or settings.webhook_tls_key:
            TlsFiles(settings.webhook_tls_cert, settings.webhook_tls_key)
        load_functions(settings.call_handlers)
        say("ok", f"your functions: {settings.call_handlers or 'those in this script'}")
    except SettingsError as error:
        say("problem", str(error))
    say(*_check_log(settings.call_log))
    health = local_health(settings)
    say(*_check_port(settings, health))
    if health.instance:
        say(*_check_way_in(settings.webhook_url, health.instance))
    return int("problem" in kinds)


# ------------------------------------------------------------------------------------------
# Page
# The command `page`: a process of its own that reads the call log and shows it in a browser of
# this machine. It knows the running server only by its /healthz.
# ------------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Calls</title>
<style>
:root {
  color-scheme: light dark;
  --back: #f5f6f8; --card: #fff; --text: #1b1f24; --soft: #57606a; --line: #d8dde3;
  --good: #1a7f5a; --mail: #8250df; --bad: #c4322b; --now: #0b63c5; --on-bad: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --card: #1d2126; --text: #e8ebee; --soft: #a3adb8; --line: #363c44;
    --good: #4cc38a; --mail: #b794f6; --bad: #ff7b72; --now: #6cb2ff; --on-bad: #14171b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif;
}
main {
  max-width: 1800px; margin: 0 auto; padding: 16px; align-items: start;
  display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr);
}
@media (min-width: 1000px) { main { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; min-width: 0;
}
section.wide { grid-column: 1 / -1; }
h2 { font-size: 15px; margin: 0 0 10px; }
h3 { font-size: 13px; color: var(--soft); margin: 14px 0 4px; }
a { color: var(--now); text-decoration: none; }
a:hover { text-decoration: underline; }
ul { list-style: none; margin: 0; padding: 0; }
li { display: flex; gap: 10px; padding: 7px 0; border-top: 1px solid var(--line); }
li:first-child { border: 0; }
li > :nth-child(2) { flex: 1; min-width: 0; }
li > :nth-child(2), .who { overflow-wrap: anywhere; }
.soft, th { color: var(--soft); font-weight: 400; }
.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
.big { font-size: 18px; }
.scroll { max-height: 26em; overflow-y: auto; margin-bottom: 8px; }
.ringing { color: var(--now); }
.talking, .answered { color: var(--good); }
.missed, .lost { color: var(--bad); }
.voicemail { color: var(--mail); }
#trouble { background: var(--bad); color: var(--on-bad); padding: 8px 16px; }
#trouble:empty { display: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 12px; }
.figures b { display: block; font-size: 22px; font-weight: 600; }
.charts {
  display: grid; gap: 8px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
}
.key span { margin-right: 14px; }
svg { display: block; width: 100%; }
svg text { fill: var(--soft); font-size: 10px; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; }
td, th { padding: 6px 10px 6px 0; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border: 0; }
tbody tr[tabindex] { cursor: pointer; }
tbody tr[tabindex]:hover { background: var(--back); }
form { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 8px; }
input, select, button, .button {
  font: inherit; color: inherit; background: var(--back); padding: 5px 10px;
  border: 1px solid var(--line); border-radius: 7px;
}
input { flex: 1; min-width: 120px; }
:focus-visible { outline: 2px solid var(--now); outline-offset: 1px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 600px) {
  main { padding: 8px; gap: 8px; }
  .side { display: none; }
  td, th { padding-right: 6px; font-size: 13px; }
  svg text { font-size: 14px; }
}
</style>
<div id="trouble" role="status"></div>
<main></main>
<script>
"use strict";
const german = navigator.language.startsWith("de");
const locale = german ? "de" : undefined;
const words = {
  "Now": "Jetzt", "Nobody is calling.": "Gerade ruft niemand an.", "Calls": "Anrufe",
  "To ring back": "Zurückrufen", "and with no number": "und ohne Nummer",
  "Nobody is waiting for a call.": "Niemand wartet auf einen Rückruf.",
  "Today": "Heute", "last week": "vor einer Woche", "incoming calls": "eingehende Anrufe",
  "median wait": "mittlere Wartezeit", "longest wait": "längste Wartezeit",
  "average talk": "mittleres Gespräch",
  "When people call": "Wann angerufen wird", "today by hour": "heute nach Stunden",
  "the last 30 days": "die letzten 30 Tage",
  "the last 4 weeks by hour": "die letzten 4 Wochen nach Stunden",
  "day": "Tag", "hour": "Stunde",
  "All calls": "Alle Anrufe", "name or number": "Name oder Nummer", "more": "mehr",
  "both directions": "beide Richtungen", "incoming": "eingehend", "outgoing": "ausgehend",
  "any outcome": "jeder Ausgang", "nothing matches": "nichts gefunden",
  "started": "Beginn", "from": "von", "to": "an", "outcome": "Ausgang", "wait": "Warten",
  "talk": "Gespräch", "by": "mit", "no number": "keine Nummer",
  "ringing": "klingelt", "talking": "im Gespräch", "answered": "angenommen",
  "missed": "verpasst", "voicemail": "Mailbox", "unanswered": "nicht erreicht",
  "rejected": "abgewiesen", "lost": "ohne Ende",
  "No calls yet.": "Noch keine Anrufe.", "Try": "Zum Ausprobieren",
  "Enter at sipgate": "Bei sipgate eintragen",
  "no connection to this program; trying again":
    "keine Verbindung zu diesem Programm; neuer Versuch läuft",
  "no server runs: calls that come now are not recorded":
    "kein Server läuft: was jetzt anruft, wird nicht aufgezeichnet",
  "the call log is behind": "das Anrufprotokoll hängt zurück",
};
const say = text => german && words[text] || text;

// An element; text in it is text, whatever it holds.
const el = (tag, attributes, ...children) => {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const soft = (...children) => el("div", { class: "soft" }, ...children);
const heading = text => el("th", {}, say(text));

// How times, spans of time, numbers and people read.
const date = (seconds, options) => new Date(seconds * 1000).toLocaleString(locale, options);
const moment = seconds =>
  date(seconds, { day: "2-digit", month: "2-digit", hour: "2-digit", minute: "2-digit" });
const two = number => String(number).padStart(2, "0");
const span = seconds => {
  if (seconds === null) return "–";
  const hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
  return (hours ? hours + ":" + two(minutes) : minutes) + ":" + two(Math.floor(seconds) % 60);
};
const isNumber = number => /^[1-9]\d{6,}$/.test(number);
const plus = number => {
  if (isNumber(number)) return "+" + number;
  return !number || number === "anonymous" ? say("no number") : number;
};
const phone = number => isNumber(number)
  ? el("a", { href: "tel:+" + number, class: "num" }, "+" + number) : plus(number);
const people = call => (call.answered_by.length ? call.answered_by : call.users).join(", ");
const joined = (...texts) => texts.filter(Boolean).join(" · ");

// The page before it has any data.
const card = (title, kind, ...children) =>
  el("section", { class: kind }, el("h2", {}, say(title)), ...children);
const choose = (label, options) => el("select", { "aria-label": say(label) },
  el("option", { value: "" }, say(label)),
  ...options.map(([value, text]) => el("option", { value }, say(text))));
const now = el("div", {}), back = el("div", {}), today = el("div", { class: "figures" });
const charts = el("div", { class: "charts" });
const find = el("input",
  { type: "search", placeholder: say("name or number"), "aria-label": say("name or number") });
const direction = choose("both directions", [["in", "incoming"], ["out", "outgoing"]]);
const outcome = choose("any outcome",
  ["answered", "missed", "voicemail", "unanswered", "rejected", "lost"].map(one => [one, one]));
const filter = el("form", {}, find, direction, outcome,
  el("a", { class: "button", href: "/calls.csv", download: "calls.csv" }, "CSV"));
const columns = [["started", ""], ["from", ""], ["to", "side"], ["outcome", ""],
  ["wait", "side"], ["talk", "side"], ["by", "side"]];
const head = columns.map(([name, kind]) => el("th", { class: kind }, say(name)));
const rows = el("tbody", {}), note = el("p", { class: "soft" });
const more = el("button", { type: "button" }, say("more"));
const KINDS = [  // and their color and dashes, which tell them apart without colors
  ["answered", "--good", ""], ["voicemail", "--mail", "3 2"], ["missed", "--bad", "1 2"]];
const key = el("p", { class: "key" },
  ...KINDS.map(([name], at) => el("span", { class: name }, "■▦□"[at] + " " + say(name))));
const trouble = document.getElementById("trouble");
document.documentElement.lang = german ? "de" : "en";
document.querySelector("main").append(
  card("Now", "", now), card("To ring back", "", back), card("Today", "", today),
  card("When people call", "wide", key, charts),
  card("All calls", "wide", filter,
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), rows), note, more));

const showNow = data => {
  const list = data.open.map(call => {
    const [other, ours] = call.direction === "out" ? [call.to, call.from] : [call.from, call.to];
    const who = say(call.outcome) + (people(call) ? ": " + people(call) : "");
    return el("li", {},
      el("span", { class: call.outcome }, call.outcome === "ringing" ? "◌" : "●"),
      el("div", {}, el("div", { class: "big" }, phone(other)), soft(joined(who, plus(ours)))),
      el("span", { class: "big num", "data-since": call.answered || call.started }));
  });
  now.replaceChildren(list.length ? el("ul", {}, ...list) : soft(say("Nobody is calling.")));
  const ringing = data.open.filter(call => call.outcome === "ringing").length;
  document.title = (ringing ? `(${ringing}) ` : "") + say("Calls");
  if (!data.empty) return;
  const simulate = el("code", {}, "python3 sipgate_callevents.py simulate");
  now.replaceChildren(el("p", {}, say("No calls yet."), " ", say("Try"), ": ", simulate));
  if (data.url) {
    now.append(el("p", {}, say("Enter at sipgate"), ": ", el("code", {}, data.url + "/new-call")));
  }
};

const showBack = data => {
  const list = data.back.map(one => el("li", {},
    el("span", { class: one.outcome, title: say(one.outcome) },
      one.outcome === "voicemail" ? "✉" : "✕"),
    el("div", {}, el("div", { class: "big" }, phone(one.from)),
      soft(joined(say(one.outcome), one.calls > 1 ? one.calls + "×" : "", one.users.join(", ")))),
    el("span", { class: "num soft" }, moment(one.started))));
  back.replaceChildren(list.length
    ? el("ul", { class: "scroll", tabindex: 0 }, ...list)
    : soft(say("Nobody is waiting for a call.")));
  if (data.withheld) back.append(soft(`${say("and with no number")}: ${data.withheld}`));
};

const showToday = data => {
  const share = value => value === null ? "–" : Math.round(value * 100) + " %";
  const figures = [
    ["incoming calls", "calls", String], ["answered", "share", share], ["missed", "missed", String],
    ["median wait", "wait", span], ["longest wait", "longest", span],
    ["average talk", "talk", span]];
  today.replaceChildren(...figures.map(([title, name, text]) => el("div", {},
    el("b", { class: "num" }, text(data.today[name])), el("div", {}, say(title)),
    soft(`${say("last week")} ${text(data.before[name])}`))));
};

// Stacked bars; their figures follow as a table for screen readers.
const bars = (title, column, labels, values) => {
  const top = Math.max(1, ...values.map(([answered, mail, missed]) => answered + mail + missed));
  const width = 600 / values.length, step = Math.ceil(values.length / 12);
  const svg = el("svg:svg", { viewBox: "0 0 600 96", "aria-hidden": "true" });
  values.forEach((counts, at) => {
    let y = 80;
    KINDS.forEach(([name, color, dashes], kind) => {
      const height = counts[kind] / top * 76;
      y -= height;
      if (height) svg.append(el("svg:rect", {
        x: at * width + 1.5, y: y + .5,
        width: Math.max(width - 3, 1), height: Math.max(height - 1, 1),
        fill: name === "missed" ? "transparent" : `var(${color})`,
        "fill-opacity": name === "voicemail" ? .45 : 1,
        stroke: `var(${color})`, "stroke-width": 1.5, "stroke-dasharray": dashes,
      }));
    });
    if (at % step === 0) svg.append(el("svg:text",
      { x: at * width + width / 2, y: 93, "text-anchor": "middle" }, labels[at]));
  });
  const lines = values.map((counts, at) => el("tr", {},
    el("th", {}, labels[at]), ...counts.map(count => el("td", {}, String(count)))));
  return el("div", {}, el("h3", {}, `${say(title)} · max. ${top}`), svg,
    el("table", { class: "hidden" }, el("caption", {}, say(title)),
      el("tr", {}, ...[column, ...KINDS.map(([name]) => name)].map(heading)), ...lines));
};

const heat = values => {
  const top = Math.max(1, ...values.flat()), title = say("the last 4 weeks by hour");
  const svg = el("svg:svg", { viewBox: "0 0 600 124", role: "img", "aria-label": title });
  values.forEach((hours, weekday) => {
    const monday = 345600 + 43200;  // noon of the first one of Unix time
    const name = date(monday + weekday * 86400, { weekday: "short", timeZone: "UTC" });
    svg.append(el("svg:text", { x: 0, y: weekday * 15 + 12 }, name));
    hours.forEach((value, hour) => svg.append(el("svg:rect", {
      x: 30 + hour * 23.7, y: weekday * 15 + 2, width: 22, height: 12, rx: 2,
      fill: "var(--now)", "fill-opacity": value ? .15 + .85 * value / top : .05,
    }, el("svg:title", {}, `${name} ${hour}:00 – ${value}`))));
  });
  for (let hour = 0; hour < 24; hour += 3) {
    svg.append(el("svg:text", { x: 41 + hour * 23.7, y: 120, "text-anchor": "middle" }, hour));
  }
  return el("div", {}, el("h3", {}, title), svg);
};

const showCharts = data => charts.replaceChildren(
  bars("today by hour", "hour", data.today.hours.map((_, hour) => hour), data.today.hours),
  bars("the last 30 days", "day", data.days.map(([day]) => day.slice(8) + "."),
    data.days.map(([, ...counts]) => counts)),
  heat(data.heat));

// The list of calls, and what a call was put together from.
let count = 50;
const open = async (row, call) => {
  if (row.nextSibling && row.nextSibling.dataset.detail) return row.nextSibling.remove();
  const lines = await (await fetch("/call?key=" + encodeURIComponent(call.key))).json();
  const list = lines.map(([at, kind, text]) => el("li", {},
    el("span", { class: "num soft" }, date(at, { timeStyle: "medium" })),
    el("div", {}, text), el("span", { class: "soft" }, kind)));
  row.after(el("tr", { "data-detail": 1 }, el("td", { colspan: 7 }, el("ul", {}, ...list))));
};
const line = call => {
  const cells = [moment(call.started), phone(call.from), phone(call.to),
    (call.direction === "out" ? "↗ " : "↘ ") + say(call.outcome),
    span(call.wait_s), span(call.talk_s), joined(call.answered_by.join(", "), call.reply)];
  const kinds =
    ["num", "who", "side who", "num " + call.outcome, "side num", "side num", "side who"];
  const row = el("tr", { tabindex: 0 },
    ...cells.map((cell, at) => el("td", { class: kinds[at] }, cell)));
  row.onclick = event => event.target.href || open(row, call);
  row.onkeydown = event => event.key === "Enter" && open(row, call);
  return row;
};
const showCalls = async () => {
  const query = new URLSearchParams(
    { text: find.value, direction: direction.value, outcome: outcome.value, count });
  const data = await (await fetch("/calls?" + query)).json();
  rows.replaceChildren(...data.calls.map(line));
  note.textContent = data.calls.length ? "" : say("nothing matches");
  more.hidden = !data.more;
};
filter.oninput = filter.onsubmit = event => { event.preventDefault(); count = 50; showCalls(); };
more.onclick = () => { count += 100; showCalls(); };

// Ask for what is new, twice a second, and less often while nobody looks.
let version = "", skew = 0;
const tick = () => document.querySelectorAll("[data-since]").forEach(node => {
  node.textContent = span(Math.max(0, Date.now() / 1000 + skew - node.dataset.since));
});
const show = async data => {
  version = data.version;
  skew = data.now - Date.now() / 1000;
  trouble.textContent = say(data.trouble);
  for (const part of [showNow, showBack, showToday, showCharts]) part(data);
  if (!document.querySelector("[data-detail]")) await showCalls();
};
const look = async () => {
  let wait = document.hidden ? 5000 : 500;
  try {
    const reply = await fetch("/data?version=" + version);
    if (!reply.ok) throw new Error(reply.status);
    const data = await reply.json();
    if (data.version) await show(data);
  } catch (error) {
    trouble.textContent = say("no connection to this program; trying again");
    version = "";  // all of it comes anew, and with it what is written there
    wait = 2000;
  }
  tick();
  setTimeout(look, wait);
};
setInterval(tick, 1000);
look();
</script>
"""
SHOWN_DAYS = 30
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # It lets in the style and the script above, and nothing else.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'" + "".join(
        f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
        for tag, part in re.findall(r"<(style|script)>(.*?)</", PAGE, re.DOTALL))}


def page_row(call: Call) -> dict[str, Any]:
    return {**call_row(call), "key": key_of(call), "users": [*map(printable, call.users)],
            "answered_by": [*map(printable, call.answered_by)]}


def words_of(call: Call) -> str:
    """What a search finds a call by."""
    words = (call.from_number, call.to_number, *call.users, *call.answered_by)
    return " ".join(words).lower()


def bar_of(call: Call) -> int:
    """What an incoming call counts as: 0 answered, 1 voicemail, 2 missed; -1 nothing (yet)."""
    if call.direction == "out":
        return -1
    if call.answered:
        return 0
    if call.outcome == "lost" and (call.ended or not call.direction):
        return -1  # the remains of one
    return {"voicemail": 1, "missed": 2, "lost": 2}.get(call.outcome, -1)


def counted(calls: Iterable[Call]) -> dict[str, Any]:
    """The figures of a day's incoming calls, and of each hour: answered, voicemail, missed."""
    hours = [[0, 0, 0] for _ in range(24)]
    calls = [call for call in calls if bar_of(call) >= 0]
    for call in calls:
        hours[time.localtime(call.started).tm_hour][bar_of(call)] += 1
    answered, _, missed = map(sum, zip(*hours))
    waits = sorted(call.wait_s for call in calls if call.wait_s is not None)
    talks = [call.talk_s for call in calls if call.talk_s is not None]
    return {"hours": hours, "calls": len(calls), "missed": missed,
            "share": answered / len(calls) if calls else None,
            "wait": waits[len(waits) // 2] if waits else None,
            "longest": max(waits, default=None),
            "talk": sum(talks) / len(talks) if talks else None}


class Overview:
    """What all open pages share: the calls of the last days, which one thread keeps up to date."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.version, self.text = "", "{}"  # what is sent to who has another version
        self.days: dict[datetime.date, dict[str, Call]] = {}  # by the day on which they began
        # A day's figures, and the words in it, until it changes.
        self._counted: dict[datetime.date, tuple[dict[str, Any], str]] = {}
        self._state, self._newest = None, 0  # of the log, as far as it was read
        self._published: Any = None  # until something changes

    def look(self) -> None:
        """Take in what is new, and publish it."""
        fault = ""
        try:
            with open_log(self.settings.call_log) as database:
                self._follow(database)
        except NothingToShow:
            self._expect(None, 0)
        except Exception as error:  # noqa: BLE001 - the page says it; the next look tries again
            fault = str(error)
        self._publish(fault)

    def _expect(self, state: Any, newest: int) -> None:
        """Begin anew if that is another log, or something was removed."""
        if state != self._state or newest < self._newest:
            self._state, self._newest, self._published = state, 0, None
            self.days, self._counted = {}, {}

    def _follow(self, database: sqlite3.Connection) -> None:
        # VACUUM, with which `forget` ends, raises the version of the schema.
        newest, *state = database.execute(
            "SELECT (SELECT coalesce(max(id), 0) FROM events), (SELECT min(id) FROM events), "
            "schema_version FROM pragma_schema_version").fetchone()
        self._expect(state, newest)
        now, due = time.time(), 50
        since = max((self._newest + 0.5) / 1e6, now - SHOWN_DAYS * DAY)
        for count, (call, legs) in enumerate(listed_calls(database, now, since)):
            self._keep(call, legs)
            if count == due:  # reading all takes a while
                self._publish()
                due *= 2
        self._newest = newest
        for call in self._open_calls():  # time alone can end them
            legs = call_with(database, key_of(call))
            if legs:
                self._keep(put_together(legs, now), legs)

    def _keep(self, call: Call, legs: Iterable[Leg]) -> None:
        """Keep a call, in place of what its legs were before."""
        key, day = key_of(call), datetime.date.fromtimestamp(call.started)
        if self.days.get(day, {}).get(key) == call:
            return
        for date, calls in self.days.items():
            for leg in legs:
                if calls.pop(leg.name, None):
                    self._counted.pop(date, None)
        self.days.setdefault(day, {})[key] = call
        self._counted.pop(day, None)
        self._published = None

    def _latest(self, moment: Callable[[Call], float], *sought: str) -> Iterator[Call]:
        # Day by day: one long sort would keep who asks waiting. Each begins with a copy.
        for day, calls in sorted(self.days.items(), reverse=True):
            # What is not counted yet may hold them all.
            _, words = self._counted.get(day, ({}, "\n".join(sought)))
            if all(text in words for text in sought):
                yield from sorted(calls.values(), key=moment, reverse=True)

    def _open_calls(self) -> list[Call]:
        return [call for day in sorted(self.days)[-2:] for call in self.days[day].values()
                if call.outcome in ("ringing", "talking")]

    def _publish(self, fault: str = "") -> None:
        health, today = local_health(self.settings), datetime.date.today()
        trouble = fault or (health.trouble if health.instance else
                            "no server runs: calls that come now are not recorded")
        if self._published != (trouble, today):
            self._published = trouble, today
            version = os.urandom(8).hex()
            figures = {"version": version, "trouble": trouble, **self._figures(today)}
            self.text, self.version = json.dumps(figures), version

    def _figures(self, today: datetime.date) -> dict[str, Any]:
        days = [today - datetime.timedelta(age) for age in range(SHOWN_DAYS)]
        heat = [[0] * 24 for _ in range(7)]
        for age, day in enumerate(days):
            if day not in self._counted:
                calls = self.days.get(day, {}).values()
                words = {text for call in calls
                         for text in (call.direction, call.outcome, words_of(call))}
                self._counted[day] = counted(calls), "\n".join(words)
            for hour, counts in enumerate(self._counted[day][0]["hours"]):
                heat[day.weekday()][hour] += sum(counts) if age < 28 else 0
        callers, withheld = to_ring_back(
            self._latest(lambda call: call.ended or call.answered or call.started))
        return {
            "now": time.time(), "url": self.settings.webhook_url, "heat": heat,
            "empty": not (self._newest or any(self.days.values())),
            "open": [*map(page_row, self._open_calls())], "withheld": withheld,
            "back": [{**page_row(calls[0]), "calls": len(calls)} for calls in callers[:100]],
            "today": self._counted[days[0]][0], "before": self._counted[days[7]][0],
            "days": [[str(day), *map(sum, zip(*self._counted[day][0]["hours"]))]
                     for day in reversed(days)]}

    # What a page asks for; the parameters stand in its address.

    def news(self, version: str = "") -> str:
        return "{}" if version == self.version else self.text

    def listed(self, text: str = "", direction: str = "", outcome: str = "",
               count: str = "50") -> str:
        text = text.lower().lstrip("+")

        def is_wanted(call: Call) -> bool:
            return (text in words_of(call) and call.direction.startswith(direction)
                    and call.outcome.startswith(outcome))

        latest = filter(is_wanted, self._latest(
            lambda call: call.started, text, direction, outcome))
        found = [*map(page_row, itertools.islice(latest, int(count)))]
        return json.dumps({"calls": found, "more": any(latest)})

    def events(self, key: str) -> str:
        with open_log(self.settings.call_log) as database:
            legs = call_with(database, key)
        call = legs and put_together(legs, time.time())
        return json.dumps([[at, event.event, words or event_line(event, call)]
                           for at, event, words in events_of(legs)])

    def as_csv(self) -> str:
        text = io.StringIO()
        with open_log(self.settings.call_log) as database:
            write_rows((call_row(call) for call, _ in listed_calls(database, time.time())),
                       "csv", text)
        return text.getvalue()


ANSWERS: dict[str, tuple[str, Callable[..., str]]] = {
    "/": ("text/html; charset=utf-8", lambda overview, **query: PAGE),
    "/data": ("application/json", Overview.news),
    "/calls": ("application/json", Overview.listed),
    "/call": ("application/json", Overview.events),
    "/calls.csv": ("text/csv; charset=utf-8", Overview.as_csv)}


class PageHandler(http.server.BaseHTTPRequestHandler):
    """One connection of a browser. Closed to all but who has the key, and to other sites."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True  # or a body comes 40 ms after its head
    server: PageServer

    def do_GET(self) -> None:
        path, _, text = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
        status, kind = self._status(path, query), "text/plain"
        body = "Open the address that the command `page` printed.\n"
        if status == 200:
            try:
                kind, answer = ANSWERS[path]
                body = answer(self.server.overview, **query)
            except CommandEnd as error:
                status, kind, body = 503, "text/plain", str(error)
            except (TypeError, ValueError):  # parameters that the page does not send
                status, kind, body = 400, "text/plain", "malformed query"
        content = body.encode()
        self.send_response(status)
        headers = {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}
        if status == 303:
            cookie = f"{self.server.cookie}; HttpOnly; SameSite=Strict; Path=/"
            headers.update({"Location": "/", "Set-Cookie": cookie})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    do_HEAD = do_GET

    def _status(self, path: str, query: dict[str, str]) -> int:
        host = self.headers.get("Host", "")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?", host):
            return 421  # another name led here (DNS rebinding)
        origin = f"http://{host}"
        if self.headers.get("Origin", origin) != origin:
            return 403
        is_first = path == "/" and "key" in query
        given = [query["key"]] if is_first else self.headers.get("Cookie", "").split("; ")
        secret = self.server.key if is_first else self.server.cookie
        if not any(hmac.compare_digest(each.encode(), secret.encode()) for each in given):
            return 403
        return 303 if is_first else 200 if path in ANSWERS else 404

    def log_message(self, *args: Any) -> None:
        pass  # the address holds the key


class PageServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = os.name != "nt"

    def __init__(self, settings: Settings, port: int) -> None:
        super().__init__(("127.0.0.1", port), PageHandler)
        self.overview, self.port = Overview(settings), self.server_address[1]
        self.key = settings.call_page_key or os.urandom(16).hex()
        # Named after the port, which cookies do not know; good for as long as the key.
        self.cookie = f"page{self.port}=" + hashlib.sha256(self.key.encode()).hexdigest()


def page(options: argparse.Namespace, settings: Settings) -> int:
    """The command `page`."""
    try:
        server = PageServer(settings, options.page_port)
    except OSError as error:
        raise CommandEnd(f"cannot listen on 127.0.0.1 port {options.page_port}: "
                         f"{error.strerror}; choose another with --port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"Open http://127.0.0.1:{server.port}/?key={server.key}\n"
          "in a browser on this machine. Ctrl-C stops.", flush=True)
    while True:
        server.overview.look()
        time.sleep(0.4)


# ------------------------------------------------------------------------------------------
# Command line
# The only place that reads settings from the environment and arguments.
# ------------------------------------------------------------------------------------------

COMMANDS = {"calls": show_calls, "forget": forget_number, "simulate": simulate, "check": check,
            "page": page}


def command_line(words: Sequence[str]) -> argparse.Namespace:
    """Return what was typed; without a command, `command` is None."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False,
                                    argument_default=argparse.SUPPRESS)
    for flag, name in (("--url", "WEBHOOK_URL"), ("--port", "WEBHOOK_PORT")):
        flags.add_argument(flag, dest=name, type=functools.partial(read_setting, name),
                           help=EXPECTED[name][1])
    flags.add_argument("--env-file", default="", help="read this file instead of .env")
    parser = argparse.ArgumentParser(
        parents=[flags], description="Take the calls of sipgate.io, or, with a command:",
        epilog=f"Settings in the environment or .env: {', '.join(SETTINGS)}")
    parser.add_argument("--version", action="version", version=__version__)
    command = parser.add_subparsers(dest="command").add_parser
    add = command("calls", help="show the latest calls").add_argument
    add("--missed", action="store_true", help="whom to ring back")
    add("--all", action="store_true", help="with --missed: each call")
    add("--since", default="2000-01-01", help="from this day on, as 2026-11-01")
    add("--number", default="*", help="with this number; * stands for any digits")
    add("--limit", type=functools.partial(read_setting, "CALL_LOG_DAYS"),  # 1 or more
        help="at most so many (20 in a table)")
    add("--events", action="store_true", help="with their events")
    add("--format", choices=("table", "csv", "excel", "json"), default="table",
        help="excel: CSV for a German Excel")
    add = command("forget", help="remove every trace of a number").add_argument
    add("number", nargs="+", help="with its country code, written as you like")
    add("--yes", action="store_true", help="do not ask")
    add = command("simulate", help="rehearse calls without a phone").add_argument
    add("scenario", nargs="?", choices=SCENARIOS, default="answered", metavar="SCENARIO",
        help=", ".join(SCENARIOS))
    add("--all", action="store_true", help="every scenario in turn")
    add("--from", dest="sender", type=bare_number, default="492111234567", help="the caller")
    add("--to", type=bare_number, default="4915791234567", help="the number called")
    add("--digits", default="1", help="what the caller presses before hanging up, as 1,0042")
    add("--sound", help="only check whether sipgate would play this file")
    command("check", help="find out why nothing arrives")
    command("page", help="show calls in a browser, on --port (8081)")
    # First the flags, which may stand anywhere; then --prot is known for what it is.
    options, rest = flags.parse_known_args(words)
    if rest and rest[0] not in (*COMMANDS, "-h", "--help", "--version"):
        parser.error(f"there is no {rest[0]}")
    parser.parse_args(rest, options)
    if options.command == "page":  # then --port is the page's
        options.page_port = vars(options).pop("WEBHOOK_PORT", 8081)
    return options


def read_settings(options: argparse.Namespace) -> Settings:
    """Return the settings, and say in `options.sources` where they are from."""
    beside = os.path.abspath(pathlib.Path(__file__).with_name(".env"))
    path = options.env_file or next(filter(os.path.isfile, (beside, ".env")), "")
    in_file = {}
    if path:
        path = os.path.abspath(path)
        in_file = read_env_file(path)
        print(f"Settings are read from {path}", file=sys.stderr)
    values = {**in_file, **os.environ, **vars(options)}
    warn_of_slips(values, SETTINGS)
    sources = {**dict.fromkeys(in_file, path), **dict.fromkeys(os.environ, "environment"),
               **dict.fromkeys(vars(options), "command line")}
    said = [f"{name} ({sources[name]})" for name in SETTINGS if values.get(name)]
    options.sources = ", ".join(said) or "all are defaults"
    return checked(values, os.path.dirname(path or beside))


def run(options: argparse.Namespace) -> int:
    """Do what the command says, or serve until a signal comes."""
    with diagnostics(sys.stderr):
        settings = read_settings(options)
        if options.command:
            return COMMANDS[options.command](options, settings)
        for warning in warnings_of(settings):
            logger.warning("%s", warning)
        keys = load_keys(settings.signature_key_file)
        functions = load_functions(settings.call_handlers)
    path, with_time = settings.call_handlers, not has_own_time(sys.stdout)
    loaded = path and os.path.getmtime(path)

    def tell(replied: Replied) -> str:
        if path and os.path.exists(path) and os.path.getmtime(path) != loaded:
            logger.warning("%s has changed: restart this program to use it", path)
        return told(replied, settings.call_output, with_time)

    return serve(settings, keys=keys, functions=functions, tell=tell, announce=announcement,
                 find_call=functools.partial(find_call, settings.call_log))


def main() -> int:
    """Return the exit status."""
    options = command_line(sys.argv[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than end at an odd name
    try:
        status = run(options)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `head` has seen enough
        sys.stdout = None  # not even flushed at the exit
        return 0
    except (SettingsError, CommandEnd, OSError) as error:
        for problem in error.args if isinstance(error, SettingsError) else [error]:
            print(wrapped(f"sipgate_callevents: {printable(str(problem))}", sys.stderr),
                  file=sys.stderr)
        return {SettingsError: 2, NothingToShow: 0}.get(type(error), 1)


if __name__ == "__main__":
    sys.exit(main())
