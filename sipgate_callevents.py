#!/usr/bin/env python3
# SPDX-License-Identifier: Unlicense
# Public domain, see https://unlicense.org
"""Receive the call events of sipgate.io: verify, print, decide, answer.

Copy this one file to a server and start it; Python 3.8 or newer is all it needs:

    python3 sipgate_callevents.py               take calls; without --url from this machine only
    python3 sipgate_callevents.py simulate      rehearse a call, without a phone
    python3 sipgate_callevents.py check         find out why nothing arrives
    python3 sipgate_callevents.py calls         the latest calls, with their outcome

sipgate POSTs a newCall when a call starts. The XML reply decides about the call and asks
for the later events: answer, hangup, and dtmf (the digits of a <Gather>). To decide
yourself, search for "edit here".

How a webhook travels through this file:

    socket bytes
      └ WebhookRequestHandler      a complete, strictly framed request, in time, within limits
          └ Receiver.receive
              ├ is_signed          on the raw bytes, before anything is decoded
              ├ parse_event        NewCallEvent, AnswerEvent, HangupEvent, DtmfEvent, UnknownEvent
              ├ CallLog.record     on disk before the webhook is acknowledged
              ├ on_new_call ...    your decision, within the time limit
              └ response_xml       bytes
      └ one sendall

Threads: the main thread waits for a signal; one accepts connections, and each connection
has one, which also runs on_new_call and on_dtmf (at most 8 at a time); a watchdog gives the
reply in place of one that is late; one runs on_answer and on_hangup; one writes the call
log; one each writes stdout and stderr, so that a stuck terminal never holds up a call.

Words: an *event* is one of sipgate's; the *response* is its XML document, the *reply* the
HTTP answer that carries it; a *handler* is http.server's class. A *call* is what a person
sees, a *leg* is what one callId names.

Not here: accounts, tunnels, certificates from Let's Encrypt, text to speech, CRM, mail.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import csv
import datetime
import email.utils
import errno
import functools
import glob
import hashlib
import http.client
import http.server
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import platform
import queue
import re
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
import unicodedata
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, TextIO

__version__ = "1.0"

logger = logging.getLogger("sipgate_callevents")

# The paths below WEBHOOK_URL, and the event that each one is for.
ROUTES = {"/new-call": "newCall", "/on-answer": "answer", "/on-hangup": "hangup", "/on-data": "dtmf"}


# ==========================================================================================
# PART I: ANSWERS THE PHONE
# All that a byte from the internet or a waiting caller can reach. Read this part before
# you trust the file; each section uses only names from sections above it.
# ==========================================================================================

# ------------------------------------------------------------------------------------------
# Warnings
# What keeps the diagnostics readable. Knows nothing of the rest.
# ------------------------------------------------------------------------------------------

class Throttle:
    """Warns at most once a minute for each reason, and counts the others: scanners are loud."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}

    def warn(self, reason: str, text: str) -> bool:
        """Log `text`, unless something was logged for `reason` within the last minute; whether it was."""
        now = time.monotonic()
        with self._lock:
            said_at, held_back = self._said.get(reason, (-math.inf, 0))
            late = now - said_at >= self.seconds
            self._said[reason] = (now, 0) if late else (said_at, held_back + 1)
        if late:
            logger.warning("%s%s", text, f" ({held_back} more since the last message)" if held_back else "")
        return late


# ------------------------------------------------------------------------------------------
# Settings
# The .env reader and the checked settings. Text in, values out: no file and no environment
# is read here.
# ------------------------------------------------------------------------------------------

class SettingsError(Exception):
    """The program cannot start as it is set up; `problems` holds one sentence for each fault."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


BLANKS = r"[^\S\r\n]*"
ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def parse_dotenv(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the `.env` file `text` adds to `environ`, read as python-dotenv reads it.

    Total: a line that cannot be read is skipped, with a warning that names its number.
    """
    position = 0
    seen: dict[str, str | None] = {}

    def take(pattern: str) -> str:
        """What `pattern` (or its group) matches here; the position moves behind it."""
        nonlocal position
        match = re.compile(pattern).match(text, position)
        if match is None:
            raise ValueError
        position = match.end()
        return match[match.lastindex or 0]

    def take_value() -> str:
        if text.startswith("'", position):
            return re.sub(r"\\([\\'])", r"\1", take(r"(?s)'((?:\\.|[^'\\])*)'"))
        if text.startswith('"', position):
            return re.sub(r"""\\([\\'"abfnrtv])""", lambda escape: ESCAPES.get(escape[1], escape[1]),
                          take(r'(?s)"((?:\\.|[^"\\])*)"'))
        return re.sub(r"\s+#.*", "", take(r"[^\r\n]*")).rstrip()

    def resolve(reference: re.Match[str]) -> str:
        known = {**seen, **environ}
        return (known[reference[1]] if reference[1] in known else reference[2]) or ""

    take(r"\ufeff?\s*")
    while position < len(text):
        line = 1 + len(re.findall(r"\r\n|\n|\r", text[:position]))
        try:
            take(r"(?:export[^\S\r\n]+)?")
            key = take(r"(?=#)|'([^']+)'|(?!')[^=#\s]+")
            take(BLANKS)
            value = take_value() if take(rf"(?:={BLANKS})?") else None
            take(rf"{BLANKS}(?:#[^\r\n]*)?(?:\r\n|\n|\r|\Z)")
        except ValueError:
            logger.warning(".env: line %d is skipped: expected NAME=value, with closed quotes if any", line)
            take(r"[^\r\n]*")
        else:
            if key:
                seen[key] = value and re.sub(r"\$\{([^}:]*)(?::-([^}]*))?\}", resolve, value)
        take(r"\s*")
    return {key: value for key, value in seen.items() if value is not None and key not in environ}


@functools.lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether `host` names this machine and no other: 127.0.0.0/8, ::1 or localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_url(text: str) -> str:
    """Return the base URL `text` without a slash at its end; ValueError says what was expected."""
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:  # brackets that hold no IPv6 address
        raise ValueError("expected a whole address such as https://example.org") from None
    if not re.fullmatch(r"https?://[^/@?#]+", f"{parts.scheme}://{parts.netloc}") or not parts.hostname:
        if "@" in parts.netloc:
            raise ValueError("leave out user and password, sipgate's webhooks do not need them")
        raise ValueError("expected a whole address such as https://example.org")
    if "?" in text or "#" in text:
        raise ValueError("leave out everything from the ? or # on")
    if not re.fullmatch(r"[A-Za-z0-9.:\[\]_-]+(/[A-Za-z0-9._~!$&'()*+,;=:@%-]*)*", text.split("://", 1)[1]):
        raise ValueError("expected a to z, digits, and punctuation that a URL can hold; other letters encoded (xn--, %C3)")
    port = re.search(r":([^:\]]*)\Z", parts.netloc)
    if port and not (re.fullmatch("[0-9]{1,5}", port[1]) and 0 < int(port[1]) < 65536):
        raise ValueError("expected a port from 1 to 65535")
    base = text.rstrip("/")
    for route in ROUTES:
        if base.endswith(route):
            raise ValueError(f"leave out {route}, it is added to {base[:-len(route)]}")
    return base


def read_host(text: str) -> str:
    """Return the address or name `text`. ValueError says what was expected."""
    address = text.strip("[]")
    if not re.fullmatch(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*|[A-Za-z0-9._-]+", address) or address.count(":") == 1:
        raise ValueError("expected an address such as 127.0.0.1 or ::1, without a port (see WEBHOOK_PORT)")
    return address


def read_port(text: str) -> int:
    """Return the port `text`; 0 lets the system choose one. ValueError says what was expected."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("expected a whole number from 1 to 65535, or 0 for any free port")
    return int(text)


def read_days(text: str) -> int:
    """Return the number of days `text`. ValueError says what was expected."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) < 1:
        raise ValueError("expected a whole number of days from 1 to 99999")
    return int(text)


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"expected {', '.join(choices[:-1])} or {choices[-1]}")
        return text.lower()
    return read


def setting(default: Any, read: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"read": read})


@dataclass(frozen=True)
class Settings:
    """The checked settings. The name of each in capitals is its name in `.env` and environment."""

    webhook_url: str = setting("", read_url)
    webhook_port: int = setting(8080, read_port)
    webhook_host: str = setting("127.0.0.1", read_host)
    webhook_tls_cert: str = setting("")
    webhook_tls_key: str = setting("")
    verify_signature: str = setting("auto", one_of("auto", "on", "off"))
    signature_key_file: str = setting("")
    call_handlers: str = setting("")
    call_log: str = setting("calls.db")
    call_log_days: int = setting(30, read_days)
    call_output: str = setting("text", one_of("text", "json", "off"))

    @classmethod
    def from_values(cls, values: Mapping[str, str], folder: str = "") -> Settings:
        """Check `values` (setting name to text; empty means not set) and return the settings.

        A relative path counts from `folder`. Raises SettingsError with one sentence for each
        value that is wrong.
        """
        found: dict[str, Any] = {}
        problems = []
        for known in fields(cls):
            name = known.name.upper()
            text = values.get(name, "").strip()
            try:
                if text:
                    found[known.name] = known.metadata["read"](text)
            except ValueError as error:
                problems.append(f'{name} is "{text}": {error}')
        settings = cls(**found)
        paths: dict[str, Any] = {name: os.path.abspath(os.path.join(folder, getattr(settings, name)))
                                 for name in ("webhook_tls_cert", "webhook_tls_key", "signature_key_file", "call_handlers", "call_log")
                                 if getattr(settings, name) not in ("", "off")}
        settings = replace(settings, **paths)
        if settings.trial and "WEBHOOK_URL" not in " ".join(problems) and not is_loopback(settings.webhook_host):
            problems.append(f'WEBHOOK_HOST is "{settings.webhook_host}" but WEBHOOK_URL is not set: '
                            "without it only this machine may be listened to; set WEBHOOK_URL "
                            "or leave WEBHOOK_HOST at 127.0.0.1")
        if bool(settings.webhook_tls_cert) != bool(settings.webhook_tls_key):
            problems.append("WEBHOOK_TLS_CERT and WEBHOOK_TLS_KEY are set together or not at all: a certificate needs its key")
        if problems:
            raise SettingsError(*problems)
        return settings

    @property
    def trial(self) -> bool:
        """Whether there is no public address yet (trial mode)."""
        return not self.webhook_url

    @property
    def base_url(self) -> str:
        scheme = "https" if self.webhook_tls_cert else "http"
        return self.webhook_url or f"{scheme}://localhost:{self.webhook_port}"

    @property
    def base_path(self) -> str:
        """The path of WEBHOOK_URL, which the proxy hands on: "" or "/3f9c2a"."""
        return urllib.parse.urlsplit(self.webhook_url).path

    def warnings(self) -> Iterator[str]:
        """What is allowed but probably not meant, a sentence each."""
        if self.trial:
            return
        url = urllib.parse.urlsplit(self.webhook_url)
        if not is_loopback(url.hostname or ""):
            if url.scheme == "http":
                yield "WEBHOOK_URL begins with http: sipgate's newer accounts take https only"
            if not url.path:
                yield ("WEBHOOK_URL has no path, and every sipgate customer's webhooks carry the same signature: "
                       f"a long random path keeps theirs out, such as WEBHOOK_URL={self.webhook_url}/"
                       + os.urandom(8).hex())
            if (url.port or (443 if url.scheme == "https" else 80)) == self.webhook_port and is_loopback(self.webhook_host):
                yield (f"WEBHOOK_URL names port {self.webhook_port} of {url.hostname}, but only {self.webhook_host} is listened "
                       "on: there must be a tunnel or proxy, or WEBHOOK_HOST must be 0.0.0.0")
        if self.verify_signature == "off":
            yield "VERIFY_SIGNATURE=off: anyone who knows the address can invent calls"


# ------------------------------------------------------------------------------------------
# Signatures
# Whether sipgate signed these bytes. Knows nothing of HTTP and of events.
# ------------------------------------------------------------------------------------------

# AlgorithmIdentifier: rsaEncryption with NULL parameters (RFC 3279 2.3.1).
RSA_ENCRYPTION = bytes.fromhex("300d06092a864886f70d0101010500")
# DigestInfo of SHA-256 up to the digest (RFC 8017 9.2, note 1).
SHA256_PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")


def _der_value(der: bytes, tag: int, start: int) -> tuple[bytes, int]:
    """The content of the DER value at `start` and where the next one begins (X.690 8.1)."""
    length, begin = der[start + 1], start + 2
    if length >= 0x80:
        begin += length & 0x7f
        length = int.from_bytes(der[start + 2:begin], "big")
    if der[start] != tag or begin + length > len(der):
        raise ValueError
    return der[begin:begin + length], begin + length


class PublicKey(NamedTuple):
    """An RSA public key."""

    modulus: int
    exponent: int

    @classmethod
    def from_pem(cls, text: str) -> PublicKey:
        """Return the first RSA key that `text` holds as "BEGIN PUBLIC KEY" (RFC 7468 13).

        Raises ValueError that says what `text` is instead.
        """
        pem = re.search(r"-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----", text)
        if not pem:
            raise ValueError('expected a PEM file with "-----BEGIN PUBLIC KEY-----" in it')
        try:
            info, _ = _der_value(base64.b64decode(pem[1]), 0x30, 0)
            if not info.startswith(RSA_ENCRYPTION):
                raise ValueError
            bits, _ = _der_value(info, 0x03, len(RSA_ENCRYPTION))
            # The first octet of a BIT STRING counts its unused bits, none here.
            numbers, _ = _der_value(bits, 0x30, 1)
            modulus, behind = _der_value(numbers, 0x02, 0)
            exponent, _ = _der_value(numbers, 0x02, behind)
        except (ValueError, IndexError):
            raise ValueError("expected an RSA key") from None
        key = cls(int.from_bytes(modulus, "big"), int.from_bytes(exponent, "big"))
        if key.modulus.bit_length() < 2048 or key.exponent < 3 or not key.modulus & key.exponent & 1:
            raise ValueError("expected an RSA key of at least 2048 bits")
        return key

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


def decode_signature(header: str | None) -> bytes:
    """The bytes of an X-Sipgate-Signature; empty if it is not canonical base64 (RFC 4648 3.5)."""
    try:
        signature = base64.b64decode(header or "", validate=True)
    except ValueError:
        return b""
    return signature if base64.b64encode(signature).decode() == header else b""


def is_signed(body: bytes, header: str | None, keys: Sequence[PublicKey]) -> bool:
    """Whether `header` (an X-Sipgate-Signature) signs `body` with one of `keys`.

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
# From the bytes of a webhook's body to a value. Knows no clock, no database, no header, no
# socket. Wire names are turned into Python names here and nowhere else.
# ------------------------------------------------------------------------------------------

class WebhookError(Exception):
    """A request that is refused: `status`, and `reason`, a constant sentence for the reply.

    `detail`, for stderr, says more, and what to do.
    """

    def __init__(self, status: int, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.detail = status, reason, detail


@dataclass(frozen=True)
class CallEvent:
    """What every event carries. What sipgate left out is "" or (); numbers and ids are text.

    `fields` is the form as it came: key to list of values, unknown keys included. `call` is the
    Call that an answer, hangup or dtmf belongs to, None where that is not known.
    """

    event: ClassVar[str]
    call_id: str = ""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False, hash=False)
    call: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class _LegEvent(CallEvent):
    from_number: str = ""  # E.164 digits without "+", or "anonymous", or a SIP id
    to_number: str = ""
    direction: str = ""  # "in" or "out"
    orig_call_id: str = ""  # the first leg, after a transfer
    xcid: str = ""  # the same on all forwarded legs
    diversion: str = ""  # the number first dialled


@dataclass(frozen=True)
class NewCallEvent(_LegEvent):
    """A leg starts to ring. `users`: those whose phones ring, or the one who calls out."""

    event: ClassVar[str] = "newCall"
    users: tuple[str, ...] = ()
    user_ids: tuple[str, ...] = ()  # such as "w0"
    full_user_ids: tuple[str, ...] = ()  # such as "1234567w0"


@dataclass(frozen=True)
class AnswerEvent(_LegEvent):
    """Somebody or something answered: voicemail and queues do too, without a user."""

    event: ClassVar[str] = "answer"
    user: str = ""
    user_id: str = ""
    full_user_id: str = ""
    answering_number: str = ""


@dataclass(frozen=True)
class HangupEvent(_LegEvent):
    """A leg ended. `cause`: normalClearing, busy, cancel, noAnswer, congestion, notFound, forwarded, ..."""

    event: ClassVar[str] = "hangup"
    cause: str = ""
    answering_number: str = ""


@dataclass(frozen=True)
class DtmfEvent(CallEvent):
    """Digits that a <Gather> collected: "" if no key was pressed, "-1" if the caller hung up.

    `state` is what gather(state=...) was given.
    """

    event: ClassVar[str] = "dtmf"
    dtmf: str = ""
    state: str = ""


@dataclass(frozen=True)
class UnknownEvent(CallEvent):
    """An event of a kind that sipgate did not have when this was written."""

    event: str = ""  # type: ignore[misc]


EVENTS: dict[str, type[CallEvent]] = {
    kind.event: kind for kind in (NewCallEvent, AnswerEvent, HangupEvent, DtmfEvent)}
TEXT_FIELDS = {
    "callId": "call_id", "origCallId": "orig_call_id", "from": "from_number", "to": "to_number",
    "direction": "direction", "cause": "cause", "diversion": "diversion", "xcid": "xcid", "dtmf": "dtmf",
    "user": "user", "userId": "user_id", "fullUserId": "full_user_id", "answeringNumber": "answering_number"}
LIST_FIELDS = {"user": "users", "userId": "user_ids", "fullUserId": "full_user_ids"}
# user[] as documented, user[][0] as sipgate's own test sends it.
LIST_KEY = re.compile(r"(user|userId|fullUserId)\[\](?:\[[0-9]+\])?")


def parse_event(body: bytes, default_event: str, state: str = "") -> CallEvent:
    """Return the event that the form in `body` holds.

    The event named in the body decides; `default_event` stands in where it names none.
    Raises WebhookError: 400 for what is no form or has a single field twice, 404 if there is
    no event at all. Unknown events and fields are kept. (sipgate's Push API, "Events".)
    """
    # Decoded before parse_qs, which fails on bytes above 127 in Python 3.8 to 3.12.1.
    text = body.decode("utf-8", "replace")
    if body and b"=" not in body:
        raise WebhookError(400, "the body is no form (application/x-www-form-urlencoded)")
    form = urllib.parse.parse_qs(text, keep_blank_values=True)

    def single(key: str) -> str:
        values = form.get(key, [""])
        if len(values) > 1:
            raise WebhookError(400, f"the form has {key} more than once")
        return values[0]

    name = single("event") or default_event
    if not name:
        raise WebhookError(404, "no event is named")
    kind = EVENTS.get(name, UnknownEvent)
    values: dict[str, Any] = {python: single(wire) for wire, python in TEXT_FIELDS.items()
                              if python in kind.__dataclass_fields__}
    if kind is NewCallEvent:
        lists: dict[str, list[str]] = {}
        for key, found in form.items():
            lists.setdefault(_list_name(key), []).extend(found)
        values.update((python, tuple(lists[wire])) for wire, python in LIST_FIELDS.items() if any(lists.get(wire, [])))
    elif kind is DtmfEvent:
        values["state"] = state
    elif kind is UnknownEvent:
        values["event"] = name
    return kind(fields=form, **values)


def _list_name(key: str) -> str:
    """`user` for `user[]` and its like, "" for any other key."""
    match = LIST_KEY.fullmatch(key) if "[" in key else None
    return match[1] if match else ""


# ------------------------------------------------------------------------------------------
# Actions and XML
# What a reply can ask of sipgate: one small function for each verb of its XML, and the one
# that writes the document. Knows no settings.
# ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Action:
    """An element of sipgate's XML; made by dial(), voicemail(), play(), gather(), reject(), hang_up()."""

    tag: str
    attributes: tuple[tuple[str, str], ...] = ()
    children: tuple[Action, ...] = ()
    text: str = ""


def _phone_number(argument: str, value: str) -> str:
    digits = re.sub(r"\A\s*\+|[\s()/-]", "", value) if isinstance(value, str) else ""
    # "+49 (0) 211" means 49211; without the brackets it would be a wrong number.
    if not re.fullmatch("[0-9]{1,32}", digits) or re.search(r"\(\s*0\s*\)", value):
        raise ValueError(f"{argument} is {value!r}: expected text of digits with the country code, such as '4915799912345'")
    return digits


def _absolute_url(argument: str, value: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[A-Za-z0-9\[][!\x22$-~]*", value):
        raise ValueError(f"{argument} is {value!r}: expected a URL that begins with http:// or https://")
    return value


def _at_least_one(argument: str, value: int) -> str:
    if type(value) is not int or value < 1:
        raise ValueError(f"{argument} is {value!r}: expected a whole number of 1 or more")
    return str(value)


def dial(*numbers: str, caller_id: str | None = None, anonymous: bool | None = None) -> Action:
    """Forward the call to 1 to 5 `numbers`, which ring together.

    Numbers are E.164 digits; +, blanks, dashes, slashes and brackets are removed.
    `caller_id` is the number to show, `anonymous` whether to show none. Raises ValueError.
    """
    if not 1 <= len(numbers) <= 5:
        raise ValueError(f"numbers: {len(numbers)} were given, expected 1 to 5")
    attributes = []
    if caller_id is not None:
        attributes.append(("callerId", _phone_number("caller_id", caller_id)))
    if anonymous is not None:
        if not isinstance(anonymous, bool):
            raise ValueError(f"anonymous is {anonymous!r}: expected True or False")
        attributes.append(("anonymous", str(anonymous).lower()))
    return Action("Dial", tuple(attributes),
                  tuple(Action("Number", text=_phone_number("numbers", number)) for number in numbers))


def voicemail() -> Action:
    """Send the caller to voicemail."""
    return Action("Dial", children=(Action("Voicemail"),))


def play(url: str) -> Action:
    """Play the sound at `url` (WAV, mono, 16-bit PCM, 8 kHz); then the call goes on as configured.

    Raises ValueError for a URL that is not absolute.
    """
    return Action("Play", children=(Action("Url", text=_absolute_url("url", url)),))


def gather(url: str | None = None, *, play: str | None = None, max_digits: int = 1,
           timeout_ms: int = 2000, state: str | None = None) -> Action:
    """Collect up to `max_digits` digits, after the sound at `play`; they come back to on_dtmf.

    `url` is the address to send them to instead of our own, `timeout_ms` runs from the end of
    the sound, in milliseconds, and `state` comes back as event.state. Raises ValueError.
    """
    # What does not begin with http is completed by response_xml.
    target = "" if url is None else _absolute_url("url", url)
    if state is not None:
        if not isinstance(state, str) or re.search("[\ud800-\udfff]", state):
            raise ValueError(f"state is {state!r}: expected text")
        target += ("&" if "?" in target else "?") + urllib.parse.urlencode({"state": state})
    sound = () if play is None else (Action("Play", children=(Action("Url", text=_absolute_url("play", play)),)),)
    return Action("Gather", (("onData", target), ("maxDigits", _at_least_one("max_digits", max_digits)),
                             ("timeout", _at_least_one("timeout_ms", timeout_ms))), sound)


def reject(reason: str = "rejected") -> Action:
    """Refuse the call: the caller hears that it is rejected, or with "busy" the busy tone."""
    if reason not in ("rejected", "busy"):
        raise ValueError(f"reason is {reason!r}: expected 'rejected' or 'busy'")
    return Action("Reject", (("reason", reason),) if reason == "busy" else ())


def hang_up() -> Action:
    """End the call."""
    return Action("Hangup")


def response_xml(action: Action | None = None, *, on_answer: str = "", on_hangup: str = "",
                 on_data: str = "") -> bytes:
    """Return sipgate's <Response> document, in ASCII, with `action` in it.

    `on_answer` and `on_hangup` are the absolute URLs to send those events to (empty: they are
    not sent); `on_data` is the one for a gather() without a URL. Raises ValueError where it
    needs one and there is none.
    """
    follow_ups = {"onAnswer": on_answer, "onHangup": on_hangup}
    response = ET.Element("Response", {name: url for name, url in follow_ups.items() if url})
    if action is not None:
        _append(response, action, on_data)
    return ET.tostring(response) + b"\n"


def _append(parent: ET.Element, action: Action, on_data: str) -> None:
    element = ET.SubElement(parent, action.tag, dict(action.attributes))
    target = element.get("onData")
    if target is not None and not target.startswith("http"):
        if not on_data:
            raise ValueError("gather() without a URL needs WEBHOOK_URL")
        element.set("onData", on_data + target)
    element.text = action.text
    for child in action.children:
        _append(element, child, on_data)


# ------------------------------------------------------------------------------------------
# Call log
# Puts events on disk, in one SQLite file. Knows no HTTP, no XML, and prints nothing.
#
# One thread writes, with the only connection that does; whatever has queued up goes into one
# transaction, so that many webhooks share one fsync. A webhook waits for its commit, but
# never longer than it is told to: a disk that is slow, full or broken delays no call.
# ------------------------------------------------------------------------------------------

APPLICATION_ID = 0x73676365  # "sgce": the file is ours
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE events(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at REAL NOT NULL,  -- Unix time, UTC
    event TEXT NOT NULL,
    call_id TEXT NOT NULL,
    body BLOB NOT NULL,         -- as received
    digest BLOB UNIQUE          -- NULL where repeats count
);
CREATE INDEX events_received_at ON events(received_at);
"""
INSERT = "INSERT OR IGNORE INTO events(received_at, event, call_id, body, digest) SELECT ?, ?, ?, ?, ?"
# A commit that failed on a bad disk may be there all the same when the file is opened again.
UNLESS_THERE = """ WHERE NOT EXISTS (
    SELECT 1 FROM events WHERE received_at = ? AND event = ? AND call_id = ? AND body = ?)"""


class Extension(NamedTuple):
    """What Part II keeps in the same file, in tables of its own that follow from the events."""

    prepare: Callable[[sqlite3.Connection], None]  # create them, or empty them where their form is an old one
    update: Callable[[sqlite3.Connection, int], bool]  # take in up to so many events; whether there are more
    remove: Callable[[sqlite3.Connection, float], bool]  # take out some of what is older than the Unix time; whether there is more
    call: Callable[[sqlite3.Connection, str], Any]  # the call that a callId belongs to, or None


class _Entry:
    """An event on its way to disk."""

    def __init__(self, row: tuple[float, str, str, bytes, bytes | None]) -> None:
        self.row = row
        self.is_new: bool | None = None  # not a repeat of a stored one; None: not tried yet
        self.stored = threading.Lock()
        self.stored.acquire()


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that writes: all of it is on disk at the end, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


class CallLog:
    """The events of the last days, on disk. Safe to use from many threads."""

    QUEUE = 10_000  # events that may wait while the disk does not take any
    BATCH = 1_000  # events in one transaction
    RETRY_SECONDS = 0.2
    LOOK_SECONDS = 1.0  # between two looks at whether the file is still ours
    LOCK_SECONDS = 0.5  # that another process may hold the lock before we are behind
    TIDY_SECONDS = 24 * 3600
    TIDY_RETRY_SECONDS = 600
    TIDY_ROWS = 500
    UPDATE_ROWS = 500  # events that the extension takes in at a time
    UPDATE_SECONDS = 0.05  # of quiet before it takes in newCalls: no caller is to wait for that

    def __init__(self, path: str, days: int, clock: Callable[[], float] = time.time,
                 extension: Extension | None = None) -> None:
        """Open or create the file at `path` that keeps events for `days`. Raises SettingsError."""
        self.extension = extension
        self._to_update = extension is not None  # whether the extension has events to take in
        self.path, self.days, self.clock = path, days, clock
        self.behind = ""  # why events wait; "" while they do not
        self._said_behind = False
        self._throttle = Throttle()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._pending: collections.deque[_Entry] = collections.deque()
        self._connection: sqlite3.Connection | None = None
        self._identity: list[tuple[int, int]] = []
        self._uncertain = False  # whether the last commit that failed did so in part only
        self._tidying: Iterator[None] | None = None
        self._tidy_at = 0.0
        self._closing = threading.Event()
        try:
            self._open()
        except sqlite3.Error as error:
            # Locked, for instance: calls do not wait for that, and neither does the start.
            self._recover(error)
        except OSError as error:
            raise SettingsError(f'CALL_LOG is "{path}": {error.strerror}; expected a file in a folder that this user '
                                "may write, or off") from None
        self._queue.put(None)  # for the first look after what is too old
        self._thread = threading.Thread(target=self._work, name="call-log", daemon=True)
        self._thread.start()

    def count(self) -> int:
        """The number of events in the file."""
        return sum(row[0] for row in self._read("SELECT count(*) FROM events", ()) or ())

    def signed_calls(self, since: float, most: int) -> list[tuple[str, float]] | None:
        """Call id and time of the latest `most` signed newCalls since the Unix time `since`; None: not to be read now."""
        return self._read("SELECT call_id, received_at FROM events WHERE received_at > ? AND event = 'newCall' AND digest "
                          "IS NOT NULL ORDER BY received_at DESC LIMIT ?", (since, most))

    def call(self, call_id: str) -> Any:
        """The call that the leg `call_id` belongs to, None if there is none or reading takes over 0.2 s."""
        if not self.extension or self.behind or not call_id:
            return None
        until = time.monotonic() + 0.2
        try:
            with contextlib.closing(self._reader(0.2)) as connection:
                connection.set_progress_handler(lambda: time.monotonic() > until, 1000)
                return self.extension.call(connection, call_id)
        except sqlite3.Error:
            return None

    def _read(self, query: str, values: Sequence[Any]) -> list[Any] | None:
        try:
            with contextlib.closing(self._reader(self.LOCK_SECONDS)) as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._throttle.warn("read", f"the call log cannot be read: {error}")
            return None

    def _reader(self, seconds: float) -> sqlite3.Connection:
        """A connection that only reads; it never blocks the writer's."""
        return sqlite3.connect(pathlib.Path(self.path).as_uri() + "?mode=ro", uri=True, timeout=seconds)

    def record(self, row: tuple[float, str, str, bytes, bytes | None], seconds: float) -> bool | None:
        """Store an event: received_at, event, call_id, body, digest (None: a repeat counts).

        Waits for the commit up to `seconds`, but not at all while the log is behind. Returns
        whether the event is new, None if that is not known yet.
        """
        if self._queue.qsize() + len(self._pending) >= self.QUEUE:
            logger.error("the call log has no room: %s of call %s is not stored, since %d events wait for the disk",
                         row[1], row[2], self.QUEUE)
            return None
        entry = _Entry(row)
        self._queue.put(entry)
        if self.behind:
            self._say_behind()
        elif entry.stored.acquire(timeout=max(seconds, 0)):
            return entry.is_new
        else:
            self._fall_behind("storing takes longer than a call can wait")
        return None

    def close(self, seconds: float) -> None:
        """Store what is queued, for up to `seconds`, and close the file."""
        self._closing.set()
        self._queue.put(None)
        connection = self._connection
        if self._tidying and connection:
            with contextlib.suppress(sqlite3.Error):
                connection.interrupt()  # VACUUM can take long
        self._thread.join(seconds)
        calls = [entry.row[2] for entry in list(self._pending)]
        while not self._queue.empty():
            entry = self._queue.get()
            calls += [entry.row[2]] if entry else []
        if calls:
            logger.error("%d events could not be stored before the end, of the calls %s",
                         len(calls), ", ".join(dict.fromkeys(calls)))

    def _open(self) -> None:
        """Connect; create the file if there is none. Raises sqlite3.Error, OSError, SettingsError."""
        # Created here, since SQLite would let others read it; -wal and -shm take after it.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        try:
            head = os.read(descriptor, 100)
        finally:
            os.close(descriptor)
        # Read here too: SQLite cannot tell a damaged file of ours from another program's.
        if head and (head[:16] != b"SQLite format 3\0" or int.from_bytes(head[68:72], "big") != APPLICATION_ID):
            raise SettingsError(f'CALL_LOG is "{self.path}": that file is not a call log of this program, and is left '
                                "alone; expected another name, or off")
        with contextlib.suppress(OSError):
            os.chmod(self.path, 0o600)
        connection = sqlite3.connect(self.path, timeout=self.LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, self._file_identity("-wal")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        for pragma in ("synchronous=FULL", "fullfsync=ON", "secure_delete=ON"):
            connection.execute("PRAGMA " + pragma)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise SettingsError(f'CALL_LOG is "{self.path}": a newer version of this program wrote it; take that, or '
                                "another file")
        if version < SCHEMA_VERSION:
            # Before WAL mode, so that the mark that it is ours is in the file itself at once.
            connection.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id={APPLICATION_ID}; {SCHEMA}"
                                     f"PRAGMA user_version={SCHEMA_VERSION}; COMMIT")
        if self.extension:
            with transaction(connection):
                self.extension.prepare(connection)
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode=WAL")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            # Network file systems do not share the memory that WAL needs.
            logger.warning("%s cannot have a write-ahead log where it is; it works, but more slowly", self.path)
        connection.execute("SELECT max(id) FROM events").fetchone()

    def _file_identity(self, *suffixes: str) -> list[tuple[int, int]]:
        """What tells the file at our path, and those with `suffixes`, from any others."""
        found = []
        for suffix in ("", *suffixes):
            with contextlib.suppress(OSError):
                status = os.stat(self.path + suffix)
                found.append((status.st_dev, status.st_ino))
        return found

    def _say_behind(self) -> None:
        if not self._said_behind:
            self._said_behind = self._throttle.warn(
                "behind", f"the call log is behind ({self.behind}): calls go through, their events wait in memory")

    def _fall_behind(self, reason: str) -> None:
        self.behind = self.behind or reason
        self._say_behind()

    def _catch_up(self) -> None:
        self.behind = ""
        if self._said_behind:
            self._said_behind = False
            logger.warning("the call log has caught up: all events are stored")

    def _work(self) -> None:
        """The writing thread: store, look after the file, tidy up, until told to end."""
        look_at = 0.0
        while True:
            self._take()
            is_quiet = not self._pending
            try:
                self._store(self._connection or self._own_connection())
                if self._closing.is_set() and not self._pending:
                    break
                if is_quiet and self._to_update:
                    with transaction(self._own_connection()):
                        self._update(self._own_connection())
                # Not after each commit: whoever waited for it would wait for this thread to let go of Python as well.
                if is_quiet or time.monotonic() >= look_at:
                    look_at = time.monotonic() + self.LOOK_SECONDS
                    self._tidy(self._own_connection())
            except (sqlite3.Error, OSError, SettingsError) as error:
                self._recover(error)
                if self._closing.is_set() and not self._pending:
                    break
                time.sleep(self.RETRY_SECONDS)
        self._disconnect()

    def _take(self) -> None:
        """Move what has queued up to `_pending`; with nothing to do, wait for it a while."""
        wait = 0.0 if self._pending or self._closing.is_set() else (
            0.01 if self._tidying else self.UPDATE_SECONDS if self._to_update else self.LOOK_SECONDS)
        with contextlib.suppress(queue.Empty):
            while wait or not self._queue.empty():
                entry = self._queue.get(timeout=wait)
                wait = 0.0
                if entry:
                    self._pending.append(entry)

    def _own_connection(self) -> sqlite3.Connection:
        """The connection to the file at our path, a new one if that is another file by now."""
        if self._connection and self._file_identity("-wal") != self._identity:
            logger.error("the call log %s was deleted or replaced; what is there now is used", self.path)
            # What -wal still holds goes into the file that it belongs to, and never into the next one.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._disconnect()
        if not self._connection:
            self._open()
        assert self._connection is not None
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection, self._tidying = self._connection, None, None
        if connection:
            connection.close()

    def _store(self, connection: sqlite3.Connection) -> None:
        """Commit what is pending, in order, in transactions of a bounded size."""
        while self._pending:
            batch = list(itertools.islice(self._pending, self.BATCH))
            again = self._uncertain
            with transaction(connection):
                for entry in batch:
                    added = connection.execute(INSERT + UNLESS_THERE if again else INSERT,
                                               entry.row + entry.row[:4] if again else entry.row).rowcount > 0
                    # The first try tells: at the next one, a commit that failed may have made this its own repeat.
                    entry.is_new = added if entry.is_new is None else entry.is_new
                # A newCall has a caller waiting, who needs no calls; your code for the other events does.
                self._to_update = True
                if any(entry.row[1] != "newCall" for entry in batch):
                    self._update(connection)
                self._uncertain = True
            self._uncertain = False
            # Deleted? Then this went into a file without a name, and goes into the next one again. (Looked for
            # only now, and for the one file: each look costs the caller as much as a tenth of the commit.)
            if self._file_identity() != self._identity[:1]:
                self._own_connection()
                return
            for entry in batch:
                self._pending.popleft()
                entry.stored.release()
        if self._queue.empty():
            self._catch_up()

    def _update(self, connection: sqlite3.Connection) -> None:
        """Have the extension take in what is new."""
        self._to_update = self._guarded(lambda extension: extension.update(connection, self.UPDATE_ROWS))

    def _guarded(self, step: Callable[[Extension], bool]) -> bool:
        """A step of the extension; False without one. An error in it must not keep events from being stored."""
        try:
            return self.extension is not None and step(self.extension)
        except sqlite3.Error:
            raise
        except Exception:
            logger.exception("an error in this program; calls are no longer put together")
            self.extension = None
            return False

    def _recover(self, error: Exception) -> None:
        """After a failure: fall behind, put a damaged file aside, and have a new connection made."""
        if not self._closing.is_set():
            self._fall_behind(str(error))
        self._disconnect()
        # SQLITE_CORRUPT and SQLITE_NOTADB, whose numbers Python tells from 3.11 on. A file that is
        # locked, cannot be read, or is on a bad disk is not damaged.
        if type(error) is sqlite3.DatabaseError and re.search("malformed|not a database", str(error)):
            name = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(self.clock()))}"
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    os.replace(self.path + suffix, name + suffix)
            logger.error("the call log was damaged; it is now %s, and a new one is begun", name)

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Once a day remove what is too old, one step at a call."""
        if self._tidying is None and self.clock() >= self._tidy_at:
            self._tidying = self._tidy_steps(connection)
        try:
            if self._tidying and next(self._tidying, True):
                self._tidying, self._tidy_at = None, self.clock() + self.TIDY_SECONDS
        except (sqlite3.OperationalError, OSError) as error:
            self._tidying, self._tidy_at = None, self.clock() + self.TIDY_RETRY_SECONDS
            logger.warning("old events could not be removed (%s); this is tried again in %d minutes", error,
                           self.TIDY_RETRY_SECONDS // 60)

    def _tidy_steps(self, connection: sqlite3.Connection) -> Iterator[None]:
        before = self.clock() - self.days * 86400
        for path in glob.glob(glob.escape(self.path) + ".damaged-*"):
            if os.path.getmtime(path) < before:
                os.remove(path)
        removed, rows = 0, -1
        while rows:
            rows = connection.execute("DELETE FROM events WHERE id IN (SELECT id FROM events WHERE received_at < ? "
                                      "LIMIT ?)", (before, self.TIDY_ROWS)).rowcount
            removed += rows
            yield
        more = self.extension is not None
        while more:
            with transaction(connection):
                more = self._guarded(lambda extension: extension.remove(connection, before))
            yield
        if removed or connection.execute("PRAGMA freelist_count").fetchone()[0]:
            self.behind = self.behind or "old events are being removed"  # no webhook waits for that
            connection.execute("VACUUM")
            self._store(connection)
        # -wal holds pages as they were before, perhaps since a removal that was cut short.
        while not self._empty_wal(connection):
            yield

    def _empty_wal(self, connection: sqlite3.Connection) -> bool:
        """Whether nothing is left in -wal; a reader can be in the way, and is not waited for."""
        connection.execute("PRAGMA busy_timeout=0")
        try:
            return not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            connection.execute(f"PRAGMA busy_timeout={self.LOCK_SECONDS * 1000:.0f}")


# ------------------------------------------------------------------------------------------
# What happens on a call                                                      *** edit here ***
# Your decisions. Knows events and actions. To keep this script replaceable, put any of the
# four functions into a file of your own and name it in CALL_HANDLERS.
# ------------------------------------------------------------------------------------------

def on_new_call(event: NewCallEvent) -> Action | None:
    """Say what happens to the call; None: it goes on as configured at sipgate. 3 seconds at most.

    if event.from_number == "anonymous":
        return reject("busy")
    """
    return None


def on_answer(event: AnswerEvent) -> None:
    """A call was answered. Runs after the reply, one at a time, and may be slow.

    print(event.user or event.answering_number, "is talking to", event.from_number)
    """


def on_hangup(event: HangupEvent) -> None:
    """A call ended. Runs after the reply, one at a time, and may be slow.

    if event.call and event.call.outcome == "missed":
        print("please ring back:", event.call.from_number)
    """


def on_dtmf(event: DtmfEvent) -> Action | None:
    """Say what follows on the digits of a gather(); None: the call goes on. 3 seconds at most.

    if event.state == "language" and event.dtmf == "1":
        return dial("4915799912345")
    """
    return None


# ------------------------------------------------------------------------------------------
# Receiving
# From the bytes of a webhook to the bytes of its reply: verify, parse, decide, render. Knows
# no sockets and no headers.
# ------------------------------------------------------------------------------------------

# sipgate waits 10 s for the reply to a newCall, and until then the phone does not ring.
REPLY_BUDGET_SECONDS = 3.0
STORE_SECONDS = 1.0  # of these, for the disk
FOLLOW_UPS_MISSED = 5  # newCalls without any answer or hangup that make a pattern


class CallFunctions(NamedTuple):
    """Your code."""

    on_new_call: Callable[[NewCallEvent], Action | None] = on_new_call
    on_answer: Callable[[AnswerEvent], None] = on_answer
    on_hangup: Callable[[HangupEvent], None] = on_hangup
    on_dtmf: Callable[[DtmfEvent], Action | None] = on_dtmf


class _Job:
    """One run of your code for one event."""

    def __init__(self, function: Callable[[Any], Any], event: CallEvent | None, deadline: float = 0,
                 when_late: Callable[[], None] = lambda: None) -> None:
        self.function, self.event, self.deadline, self.when_late = function, event, deadline, when_late
        self.name = getattr(function, "__name__", "your code")
        self.thread = threading.get_ident()
        self.late = False  # nobody waits for the result any more
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function(self.event)
            sys.stdout.flush()  # of print(..., end="")
        except BaseException as error:  # noqa: BLE001 - sys.exit() in your code must not end our thread
            self.error = error

    def report(self, consequence: str) -> None:
        """Log what your code raised."""
        if self.error is None:
            return
        text, trace = f"{self.name} raised {type(self.error).__name__}; {consequence}", self.error.__traceback__
        try:
            logger.error("%s", text, exc_info=(type(self.error), self.error, trace and trace.tb_next))
        except RecursionError:  # Python 3.8, at the end of a long chain of them
            logger.error("%s", text)

    def where(self) -> str:
        """The lines that your code is at, innermost last."""
        frames = traceback.walk_stack(sys._current_frames().get(self.thread))
        yours = itertools.takewhile(lambda pair: pair[0].f_code is not _Job.run.__code__, frames)
        return "".join(reversed(traceback.StackSummary.extract(yours).format()))


class Late(Exception):
    """Your code took too long, and the reply has been given without it."""


class Decisions:
    """Runs on_new_call and on_dtmf in the thread that asks, under the eyes of a watchdog.

    A thread cannot be killed: it is lost to code that hangs, until that returns. So at most
    `THREADS` run your code at a time, and once all of these are lost, calls no longer wait.
    (Handing each event to another thread and back would cost more than all the rest.)
    """

    THREADS = 8
    WATCH_SECONDS = 0.05

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: set[_Job] = set()
        self._lost = 0
        self._asleep = True
        self._throttle = Throttle()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def decide(self, function: Callable[[Any], Action | None], event: CallEvent, deadline: float,
               when_late: Callable[[], None]) -> Action | None:
        """Return what `function` makes of `event`, None if it fails.

        At `deadline` (time.monotonic()) `when_late` is called from another thread, and
        Late raised here once `function` has returned.
        """
        job = _Job(function, event, deadline, when_late)
        if not self._begin(job):
            self._throttle.warn("busy", f"all {self.THREADS} threads for your code are busy; "
                                        "until one returns, calls go through undecided")
            return None
        job.run()
        job.report("the call goes through undecided")  # still watched: it runs the exception's own __str__
        self._end(job)
        if job.result is None or isinstance(job.result, Action):
            return job.result
        logger.error("%s returned a %s, not an action such as dial(...); the call goes through undecided",
                     job.name, type(job.result).__name__)
        return None

    def _begin(self, job: _Job) -> bool:
        """Take one of the threads, waiting for it if need be, but not for the lost ones."""
        with self._condition:
            self._condition.wait_for(lambda: len(self._running) + self._lost < self.THREADS or self._lost == self.THREADS,
                                     job.deadline - time.monotonic())
            if len(self._running) + self._lost >= self.THREADS:
                return False
            self._running.add(job)
            if self._asleep:
                self._asleep = False
                self._condition.notify_all()
        return True

    def _end(self, job: _Job) -> None:
        with self._condition:
            self._running.discard(job)
            self._lost -= job.late
            if len(self._running) + self._lost == self.THREADS - 1:
                self._condition.notify_all()
        if job.late:
            raise Late

    def _watch(self) -> None:
        while True:
            with self._condition:
                self._asleep = not self._running
                self._condition.wait(None if self._asleep else self.WATCH_SECONDS)
                now = time.monotonic()
                late = [job for job in self._running if job.deadline <= now]
                self._running.difference_update(late)
                self._lost += len(late)
                if self._lost >= self.THREADS:
                    self._condition.notify_all()
                for job in late:
                    job.late = True
            for job in late:
                try:
                    # In a thread of its own: a reply to a client that does not read must not hold up the others.
                    threading.Thread(target=job.when_late, name="late-reply", daemon=True).start()
                except RuntimeError:  # there can be no more threads
                    job.when_late()
            for job in late:
                logger.error("%s has not returned in time; the call goes through undecided. It is at", job.name,
                             extra={"where": job.where()})


class FollowUps:
    """Runs on_answer and on_hangup after the reply, one at a time, in order of arrival."""

    LIMIT = 1000  # how many may wait

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._throttle = Throttle()
        threading.Thread(target=self._work, name="follow-ups", daemon=True).start()

    def put(self, function: Callable[[Any], None], event: CallEvent) -> None:
        """Have `function` called with `event`, soon; never waits."""
        job = _Job(function, event)
        if self._jobs.qsize() < self.LIMIT:
            self._jobs.put(job)
        else:
            self._throttle.warn("full", f"{job.name} was not run: {self.LIMIT} events wait for your code")

    def finish(self, seconds: float) -> int:
        """Wait up to `seconds` for what was put; return how many events are left."""
        finished = threading.Event()
        self._jobs.put(_Job(lambda event: finished.set(), None))
        return 0 if finished.wait(seconds) else self._jobs.qsize()  # with the one that runs, less our own

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            job.run()
            job.report("the event counts as handled")


class Reply(NamedTuple):
    """What goes back over HTTP; `afterwards` is called once it has left."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    afterwards: Callable[[], None] = lambda: None


# The three refusals of a signature: reply, and what to do about it.
MISSING = (
    "signature missing, see VERIFY_SIGNATURE",
    "a webhook was refused, X-Sipgate-Signature is missing: it is not from sipgate, or a proxy drops that "
    + "header (to try it with curl, start without WEBHOOK_URL)")
MALFORMED = (
    "signature malformed, see SIGNATURE_KEY_FILE",
    "a webhook was refused, X-Sipgate-Signature is malformed: it is not from sipgate, or a proxy changes that header")
MISMATCH = (
    "signature does not match, see SIGNATURE_KEY_FILE",
    "a webhook was refused, X-Sipgate-Signature does not match: it is not from sipgate, or a proxy changes "
    + "the body, or sipgate has a new key (SIGNATURE_KEY_FILE)")
DISCARDED = b"This response will be discarded"


class Receiver:
    """Turns the webhooks of one sipgate account into replies. Safe to use from many threads."""

    KNOWN_CALLS = 20_000  # call ids remembered; as many newCalls in 24 hours is one every 4 seconds
    KNOWN_SECONDS = 24 * 3600
    reply_budget_seconds = REPLY_BUDGET_SECONDS

    def __init__(self, settings: Settings, keys: Sequence[PublicKey], functions: CallFunctions,
                 show: Callable[[CallEvent, float], None] = lambda event, received_at: None,
                 clock: Callable[[], float] = time.time, call_log: CallLog | None = None) -> None:
        """`show` is called with each event and when it came (Unix time, by `clock`)."""
        self.call_log = call_log
        self.settings, self.keys, self.functions, self.show, self.clock = settings, keys, functions, show, clock
        base = settings.base_path
        self.routes = {base + route: event for route, event in ROUTES.items()}
        # Somebody entered WEBHOOK_URL at sipgate as it stands: the body says which event it is.
        self.routes.update({base + "/": "", base or "/": ""})
        self.urls = {name: settings.base_url + route for name, route in
                     (("on_answer", "/on-answer"), ("on_hangup", "/on-hangup"), ("on_data", "/on-data"))}
        self._undecided = response_xml(None, **self.urls)  # most replies are this one
        self.refused = 0  # webhooks, since the start
        self._unfollowed = 0.0  # newCalls, until the first answer or hangup comes
        self.throttle = Throttle()
        self.decisions, self.follow_ups = Decisions(), FollowUps()
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[str, float] = collections.OrderedDict()
        self._digests: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._is_filled = call_log is None  # with the calls from before the start
        self._fill_known()

    def health(self) -> str:
        """What is wrong, "" if nothing is."""
        behind = self.call_log.behind if self.call_log else ""
        return f"the call log is behind: {behind}" if behind else ""

    def receive(self, target: str, body: bytes, signature: str | None = None, outside: str = "",
                when_late: Callable[[Reply], None] = lambda reply: None) -> Reply:
        """Return the reply to the webhook `body` that was POSTed to `target` (path and query).

        `signature` is its X-Sipgate-Signature, `outside` the host it was addressed to if it
        came from beyond this machine. Raises WebhookError for what is refused. If your code
        has not decided in time, `when_late` is called from another thread with the reply to
        give, and Late raised here when your code returns.
        """
        deadline = time.monotonic() + self.reply_budget_seconds
        path, _, query = target.partition("?")
        if path in ROUTES and path not in self.routes:
            self._count_refusal()
            raise WebhookError(404, "not found", f"a webhook came in at {path} instead of {self.settings.base_path}{path}: the "
                               "proxy cuts off the path of WEBHOOK_URL; let it pass the path on, or set WEBHOOK_URL without it")
        if path not in self.routes:
            raise WebhookError(404, "not found")
        state = dict(urllib.parse.parse_qsl(query)).get("state", "")
        try:
            event = self._admit(body, signature, outside, self.routes[path], state)
        except WebhookError:
            self._count_refusal()
            raise
        # From here on the call is real, and no fault of ours may keep it from going through.
        try:
            if self.routes[path] not in ("", event.event) and event.event in EVENTS:
                self.throttle.warn(f"{event.event} on {path}", f"event {event.event} came in on {path}, "
                                           "the path of another event: check the URLs entered at sipgate")
            self._watch_follow_ups(event)
            received_at = self.clock()
            is_new = self._record(event, body, received_at)
            if self.call_log and isinstance(event, (AnswerEvent, HangupEvent, DtmfEvent)):
                event = replace(event, call=self.call_log.call(event.call_id))
            self.show(event, received_at)
            return self._respond(event, is_new, deadline, outside, when_late)
        except Late:
            raise
        except Exception:
            logger.exception("an error in this program; the call goes through undecided")
            return self._xml(None, outside)

    def _watch_follow_ups(self, event: CallEvent) -> None:
        if isinstance(event, NewCallEvent):
            self._unfollowed += 1
            if self._unfollowed == FOLLOW_UPS_MISSED and not self.settings.trial:
                logger.warning("follow-ups do not arrive: %d newCalls, but no answer and no hangup; the URLs in the replies begin "
                               "with %s, which must be reached from the internet", FOLLOW_UPS_MISSED, self.settings.base_url)
        elif isinstance(event, (AnswerEvent, HangupEvent)):
            self._unfollowed = -math.inf

    def _count_refusal(self) -> None:
        with self._lock:
            self.refused += 1

    def _admit(self, body: bytes, signature: str | None, outside: str, default_event: str, state: str) -> CallEvent:
        """Verify, then parse. Raises WebhookError for what is not sipgate's, or no event."""
        if self.settings.verify_signature == "off":
            return parse_event(body, default_event, state)
        if signature is None:
            return self._admit_unsigned(body, outside, default_event, state)
        if not is_signed(body, signature, self.keys):
            known_length = len(decode_signature(signature)) in [key.size for key in self.keys]
            raise WebhookError(403, *(MISMATCH if known_length else MALFORMED))
        event = parse_event(body, default_event, state)
        if not event.call_id:
            raise WebhookError(400, "callId is missing")
        if isinstance(event, NewCallEvent):
            self._remember(event.call_id)
        return event

    def _admit_unsigned(self, body: bytes, outside: str, default_event: str, state: str) -> CallEvent:
        """What VERIFY_SIGNATURE=auto lets in: trial mode on this machine, and events of known calls."""
        if self.settings.verify_signature == "on" or (self.settings.trial and outside):
            raise WebhookError(403, *MISSING)
        if self.settings.trial:
            return parse_event(body, default_event, state)
        try:
            event = parse_event(body, default_event, state)
        except WebhookError:
            raise WebhookError(403, *MISSING) from None
        if not isinstance(event, (AnswerEvent, HangupEvent, DtmfEvent)) or not self._is_known(event.call_id):
            raise WebhookError(403, *MISSING)
        self.throttle.warn("unsigned", "an answer, hangup or dtmf came without a signature and was taken for its "
                                       "call id; VERIFY_SIGNATURE=on would refuse it")
        return event

    def _remember(self, call_id: str) -> None:
        with self._lock:
            self._known[call_id] = self.clock()
            self._known.move_to_end(call_id)
            if len(self._known) > self.KNOWN_CALLS:
                self._known.popitem(last=False)

    def _fill_known(self) -> None:
        """Know the calls from before the start again; later, if the log cannot be read now."""
        if not self._is_filled and self.call_log:
            since = self.clock() - self.KNOWN_SECONDS
            calls = self.call_log.signed_calls(since, self.KNOWN_CALLS)
            with self._lock:
                self._is_filled = calls is not None
                for call_id, received_at in reversed(calls or []):
                    self._known.setdefault(call_id, received_at)

    def _is_known(self, call_id: str) -> bool:
        self._fill_known()
        with self._lock:
            return self.clock() - self._known.get(call_id, -math.inf) < self.KNOWN_SECONDS

    def _record(self, event: CallEvent, body: bytes, received_at: float) -> bool:
        """Have the event stored; whether it is not an exact repeat (where signatures are checked)."""
        once = (isinstance(event, (NewCallEvent, AnswerEvent, HangupEvent))
                and self.settings.verify_signature != "off" and not self.settings.trial)
        digest = hashlib.sha256(b"\0".join((event.event.encode(), event.call_id.encode(), body))).digest() if once else None
        is_new = None
        if self.call_log:
            is_new = self.call_log.record((received_at, event.event, event.call_id, body, digest), STORE_SECONDS)
        with self._lock:
            repeat = digest in self._digests
            if digest:
                self._digests[digest] = None
                if len(self._digests) > self.KNOWN_CALLS:
                    self._digests.popitem(last=False)
        return is_new is not False and not repeat

    def _respond(self, event: CallEvent, is_new: bool, deadline: float, outside: str,
                 when_late: Callable[[Reply], None]) -> Reply:
        if isinstance(event, (NewCallEvent, DtmfEvent)):
            function = self.functions.on_new_call if isinstance(event, NewCallEvent) else self.functions.on_dtmf
            action = self.decisions.decide(function, event, deadline, lambda: when_late(self._xml(None, outside)))
            return self._xml(action, outside)
        if isinstance(event, (AnswerEvent, HangupEvent)):
            follow = self.functions.on_answer if isinstance(event, AnswerEvent) else self.functions.on_hangup
            return Reply(200, DISCARDED, afterwards=lambda: self.follow_ups.put(follow, event) if is_new else None)
        return Reply(200, response_xml(), "application/xml")

    def _xml(self, action: Action | None, outside: str) -> Reply:
        urls = self.urls
        if outside and self.settings.trial:
            # Our localhost URLs would lead sipgate nowhere.
            urls = {}
            self.throttle.warn("outside", f"this came in for {outside}; restart with --url https://{outside} "
                                          "to get answer and hangup too")
        try:
            document = response_xml(action, **urls) if action or not urls else self._undecided
        except ValueError as error:
            logger.error("%s; the call goes through undecided", error)
            document = response_xml(None, **urls)
        return Reply(200, document, "application/xml")


# ------------------------------------------------------------------------------------------
# HTTP
# One request after the other from a connection, strictly framed (RFC 9112), in time and
# within limits; one reply to each. Knows nothing of events, XML and settings.
#
# The header parser of http.server is not used: it is the e-mail parser, to which a bare CR
# begins a new header and one bad line ends them all, Content-Length included.
# ------------------------------------------------------------------------------------------

MAX_LINE = 8 * 1024  # bytes of a request or header line
MAX_HEAD = 32 * 1024
MAX_HEADERS = 64
MAX_BODY = 64 * 1024

REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.([01])\r")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):([\t\x20-\x7e\x80-\xff]*)\r")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,6})\r\n")
CHUNK_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{0,6}|[0-9A-Fa-f]{1,6}\r")
HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
# Twice, each of these is a way to make two readers see two different requests.
SINGLE_HEADERS = {"content-length", "host", "transfer-encoding", "expect", "content-type", "x-sipgate-signature"}
# What tunnels, proxies and browsers add; an Origin or Sec-Fetch-Site is a web page's, from wherever it was loaded.
PASSED_ON = ("x-forwarded-", "forwarded", "via", "x-real-ip", "x-original-", "cf-", "true-client-ip", "origin", "sec-fetch-")


class RequestHead(NamedTuple):
    """A request line and its headers; names in lower case, repeated ones joined by ", "."""

    method: str
    target: str
    minor: int  # of the version: 0 or 1
    headers: dict[str, str]
    size: int  # bytes of the head

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


def parse_head(received: bytes) -> RequestHead | None:
    """Return the request head that `received` begins with, None if more has to come.

    Raises WebhookError (400, 414, 431). Each line is judged when it is complete or too long,
    so that the verdict does not depend on how the bytes were cut on their way.
    """
    start = 2 if received.startswith(b"\r\n") else 0  # RFC 9112 2.2
    head = received[start:MAX_HEAD]
    end = head.find(b"\r\n\r\n")
    lines = head[:end + 2 if end >= 0 else None].split(b"\n")
    rest = lines.pop()
    matches = []
    for number, line in enumerate(lines):
        match = (HEADER_LINE if number else REQUEST_LINE).fullmatch(line)
        if match is None or len(line) > MAX_LINE + 1 or number > MAX_HEADERS:
            _check_line(line, number)
            raise WebhookError(400, "malformed header line" if number else "malformed request line")
        matches.append(match)
    _check_line(rest, len(lines))
    if end < 0:
        if len(received) >= MAX_HEAD:
            raise WebhookError(431, "request head too large")
        return None
    method, target, minor = matches[0].groups()
    return RequestHead(method.decode(), target.decode(), int(minor), _headers(matches[1:], minor), start + end + 4)


def _check_line(line: bytes, number: int) -> None:
    """Refuse a line, complete or not, that can no longer become a good one; `line` may end in CR."""
    if 0 <= line.find(b"\r", 0, MAX_LINE + 1) < len(line) - 1:
        raise WebhookError(400, "bare carriage return")
    if len(line) > MAX_LINE + 1:
        raise WebhookError(431, "header line too long") if number else WebhookError(414, "request line too long")
    if number > MAX_HEADERS and line not in (b"", b"\r"):
        raise WebhookError(431, "too many headers")


def _headers(matches: Sequence[re.Match[bytes]], minor: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for match in matches:
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if name not in headers:
            headers[name] = value
        elif name in SINGLE_HEADERS:
            raise WebhookError(400, "a header that must be single is repeated")
        else:
            headers[name] += ", " + value
    if not HOST.fullmatch(headers.get("host", "" if minor == b"1" else "none")):
        raise WebhookError(400, "Host missing or malformed")
    return headers


def body_length(head: RequestHead) -> int | None:
    """Return how many bytes of body follow `head`, None if it is chunked (RFC 9112 6.3).

    Raises WebhookError (400, 413, 501).
    """
    length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise WebhookError(400, "both Transfer-Encoding and Content-Length")
        if coding.lower() != "chunked":
            raise WebhookError(501, "transfer coding not supported")
        if head.method != "POST" or not head.minor:
            raise WebhookError(400, "a chunked body where none belongs")
        return None
    if length is None:
        return 0
    if not re.fullmatch("[0-9]{1,9}", length):
        raise WebhookError(400, "malformed Content-Length")
    if int(length) and head.method in ("GET", "HEAD"):
        raise WebhookError(400, "a body where none belongs")
    if int(length) > MAX_BODY:
        raise WebhookError(413, "body too large")
    return int(length)


def take_chunk(received: bytes, start: int) -> tuple[bytes, int] | None:
    """Return the chunk at `start` (RFC 9112 7.1; the last is empty) and where the next one begins.

    None if more has to come. Raises WebhookError (400, 413); extensions and trailers are refused.
    """
    line = CHUNK_LINE.match(received, start)
    if line is None:
        if CHUNK_LINE_BEGUN.fullmatch(received, start):
            return None
        raise WebhookError(400, "malformed chunk")
    size = int(line[1], 16)
    if size > MAX_BODY:
        raise WebhookError(413, "body too large")
    end = line.end() + size
    if not b"\r\n".startswith(received[end:end + 2]):
        raise WebhookError(400, "malformed chunk")
    return (received[line.end():end], end + 2) if len(received) >= end + 2 else None


@functools.lru_cache(maxsize=2)
def http_date(moment: int) -> str:
    """Unix time in the form of a Date header (RFC 9110 5.6.7)."""
    return email.utils.formatdate(moment, usegmt=True)


def outside_host(headers: Mapping[str, str]) -> str:
    """The host that a request from beyond this machine was addressed to; "" for one from here.

    A tunnel or proxy makes every visitor look like 127.0.0.1, so the headers have to tell.
    """
    host = headers.get("host", "")
    name = HOST.fullmatch(host)
    local = name is not None and is_loopback(name[1].strip("[]"))
    passed_on = any(key.startswith(PASSED_ON) for key in headers)
    if local and not passed_on:
        return ""
    return host if host and not local else "the-address-of-your-proxy"


class Connection:
    """What the server has to know of a connection; guarded by its lock, but for the deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.since = time.monotonic()  # waiting for a request, or for the client to go
        self.deadline = math.inf
        self.in_flight = False  # a complete request is being processed
        self.is_cut = False
        self.is_lost = False  # its thread hangs in your code, though the reply has been given

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """Have the connection's thread find the end of its input."""
        self.is_cut = True
        with contextlib.suppress(OSError):  # it may have ended already
            # Winsock does not promise that SHUT_RD wakes anybody; a 408 cannot be sent there.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR if os.name == "nt" else how)


class WebhookRequestHandler(http.server.BaseHTTPRequestHandler):
    """One connection, in its own thread.

    Its socket blocks; the server cuts what has passed its deadline. So every limit is absolute,
    and no client can stretch it byte by byte.
    """

    disable_nagle_algorithm = True
    head_seconds = 10.0
    body_seconds = 10.0
    reply_seconds = 10.0
    idle_seconds = 75.0  # longer than nginx keeps a connection (60), which does not repeat a POST
    linger_seconds, linger_bytes = 1.0, 4 * 1024 * 1024
    pipeline_seconds = 0.05

    server: WebhookServer

    def setup(self) -> None:
        self.state = self.server.state_of(self.request)
        self.received = b""
        self.is_first = True  # no request has come yet
        self.close_connection, self.command = True, ""
        self.late_reply = threading.Event()  # one has been sent in place of ours
        self._allow(self.head_seconds)
        if self.server.tls:
            self._shake_hands(self.server.tls)
        super().setup()

    def _shake_hands(self, tls: TlsFiles) -> None:
        """Begin TLS, here and not in the accepting thread, which a silent client would hold up."""
        plain = self.request.recv(1, socket.MSG_PEEK) not in (b"", b"\x16")
        if plain:
            self.server.receiver.throttle.warn("plain", "http on the https port: a plain request came in; the tunnel or "
                                               "proxy must speak https to this port, or leave out WEBHOOK_TLS_CERT")
            self.connection = self.request
            self._send(Reply(400, b"this port speaks https\n"))
            self._linger()
            raise ConnectionAbortedError
        self.request = tls.context().wrap_socket(self.request, True, do_handshake_on_connect=False)
        if not self.server.switch(self.state, self.request):
            raise ConnectionAbortedError
        self.request.do_handshake()

    def handle_one_request(self) -> None:
        """Read one request and reply to it."""
        self.close_connection, self.command = True, ""  # until a request says otherwise
        try:
            self._take_request()
        except WebhookError as error:
            self.server.receiver.throttle.warn(error.reason, f"a request was refused with {error.status}: {error.reason}")
            self._send(Reply(error.status, error.reason.encode() + b"\n"))
            self._linger()
        except Late:
            self.close_connection = True
            self.late_reply.wait(self.reply_seconds)

    def _allow(self, seconds: float) -> None:
        self.state.deadline = time.monotonic() + seconds

    def _take_request(self) -> None:
        head = self._read_head()
        if head is None:
            return
        self.command = head.method
        length = body_length(head)
        if "expect" in head.headers and not self._meet_expectation(head):
            return
        self._allow(self.body_seconds)
        body = self._read_chunks(head.size) if length is None else self._read_body(head.size, length)
        if body is None:
            return
        self.is_first = False
        if not self.server.begin(self.state):
            if not self.server.stopping:
                raise WebhookError(408, "request too slow")
            self._send(Reply(503, b"stopping\n"))
            return
        options = [option.strip().lower() for option in head.headers.get("connection", "").split(",")]
        self.close_connection = not head.minor or "close" in options
        self._finish(self._reply(head, body))

    def _read_head(self) -> RequestHead | None:
        """The next request head, None if the client closes, or says nothing for too long."""
        if self.received:
            # Neither sipgate nor a proxy pipelines; who does is not to take the time of a caller.
            time.sleep(self.pipeline_seconds)
        idle = not self.is_first and not self.received
        self._allow(self.idle_seconds if idle else self.head_seconds)
        head = parse_head(self.received)
        while head is None:
            if not self._receive():
                return None
            if idle:
                idle = False
                self._allow(self.head_seconds)
            if self.received[0] == 0x16:
                self.server.receiver.throttle.warn("tls", "https on the http port: a TLS handshake came in; the "
                                                   "tunnel or proxy must speak http to this port")
                return None
            head = parse_head(self.received)
        return head

    def _meet_expectation(self, head: RequestHead) -> bool:
        """Ask for the body if it will be taken (RFC 9110 10.1.1); reply if not. Raises WebhookError (417)."""
        if head.headers["expect"].lower() != "100-continue":
            raise WebhookError(417, "expectation not supported")
        if head.method not in self._allowed(head):
            self._send(self._reply(head, b""))
            self._linger()
            return False
        if head.minor:
            self._allow(self.reply_seconds)
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _read_body(self, start: int, length: int) -> bytes | None:
        """The body that begins at `start` of what is received, None if the client closes before its end."""
        while len(self.received) < start + length:
            if not self._receive():
                return None
        body, self.received = self.received[start:start + length], self.received[start + length:]
        return body

    def _read_chunks(self, start: int) -> bytes | None:
        """The same for a chunked body."""
        body, position, chunk = b"", start, b"-"
        while chunk:
            taken = take_chunk(self.received, position)
            if taken is None and not self._receive():
                return None
            chunk, position = taken or (chunk, position)
            body += chunk if taken else b""
            # The frames count as well: with a byte in each chunk they are the most of it.
            if len(body) > MAX_BODY or position - start > 2 * MAX_BODY:
                raise WebhookError(413, "body too large")
        self.received = self.received[position:]
        return body

    def _receive(self) -> bool:
        """Receive what has come; False at the end. Raises WebhookError (408)."""
        more = self.connection.recv(65536)
        if not more and self.state.is_cut and self.received and not self.server.stopping:
            raise WebhookError(408, "request too slow")
        self.received += more
        return bool(more)

    def _allowed(self, head: RequestHead) -> tuple[str, ...]:
        """The methods that the path of `head` knows; none if there is no such path."""
        if head.path in self.server.health_paths:
            return ("GET", "HEAD")
        return ("POST",) if head.path in self.server.receiver.routes else ()

    def _reply(self, head: RequestHead, body: bytes) -> Reply:
        try:
            method: Callable[..., Reply] = getattr(self, "do_" + head.method, self.do_other)
            return method(head, body)
        except Late:
            raise
        except WebhookError as error:
            if error.detail or error.status != 404:
                self.server.receiver.throttle.warn(error.reason, error.detail or f"a webhook was refused: {error.reason}")
            return Reply(error.status, error.reason.encode() + b"\n")
        except Exception:
            logger.exception("an error in this program; replied 500")
            return Reply(500, b"internal error\n")

    def do_POST(self, head: RequestHead, body: bytes) -> Reply:
        """A webhook."""
        if head.path in self.server.health_paths:
            return self.do_other(head, body)
        receiver, headers = self.server.receiver, head.headers
        reply = receiver.receive(head.target, body, headers.get("x-sipgate-signature"), outside_host(headers),
                                 self._finish_late)
        form = "application/x-www-form-urlencoded"
        if body and headers.get("content-type", "").partition(";")[0].strip().lower() != form:
            receiver.throttle.warn("content type", f"a webhook came without Content-Type: {form}; sipgate sends one")
        return reply

    def do_GET(self, head: RequestHead, body: bytes) -> Reply:
        """The health of this process."""
        if head.method not in self._allowed(head):
            return self.do_other(head, body)
        wrong = self.server.receiver.health()
        return Reply(503 if wrong else 200, (wrong or "ok").encode() + b"\n", headers=(("X-Instance", self.server.instance),
                                            ("X-Refused", str(self.server.receiver.refused)),
                                            ("Cache-Control", "no-store")))

    do_HEAD = do_GET

    def do_other(self, head: RequestHead, body: bytes) -> Reply:
        """Every method where it does not belong."""
        allowed = self._allowed(head)
        if not allowed:
            raise WebhookError(404, "not found")
        says = b"takes POST from sipgate\n" if allowed == ("POST",) else b"takes GET\n"
        return Reply(405, says, headers=(("Allow", ", ".join(allowed)),))

    def _finish(self, reply: Reply) -> None:
        """Give the reply to a complete request."""
        self.close_connection |= self.server.stopping
        try:
            self._send(reply)
        finally:
            try:
                reply.afterwards()
            finally:
                self.server.end(self.state)

    def _finish_late(self, reply: Reply) -> None:
        """Give the reply in place of our own thread, which is lost to your code, and so is the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._finish(reply)
        self.late_reply.set()
        self.server.lose(self.state)

    def _send(self, reply: Reply) -> None:
        """Write `reply` in one piece, so that it is one TCP segment."""
        lines = [f"HTTP/1.1 {reply.status} {self.responses[reply.status][0]}",
                 "Date: " + http_date(int(time.time())),
                 "Content-Type: " + reply.content_type,
                 f"Content-Length: {len(reply.body)}",
                 *(f"{name}: {value}" for name, value in reply.headers)]
        if self.close_connection:
            lines.append("Connection: close")
        body = b"" if self.command == "HEAD" else reply.body
        self._allow(self.reply_seconds)
        self.connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def _linger(self) -> None:
        """Read on for a moment: closed with input unread, the client would see a reset, not the reply."""
        self._allow(self.linger_seconds)
        socket.socket.shutdown(self.connection, socket.SHUT_WR)
        left = self.linger_bytes
        while left > 0:
            more = self.connection.recv(65536)
            if not more:
                return
            left -= len(more)


class TlsFiles:
    """The certificate and key of the webhook port; a renewed pair is picked up while it runs."""

    CHECK_SECONDS = 1.0

    def __init__(self, certificate: str, key: str) -> None:
        """Load the PEM files. Raises SettingsError."""
        self.certificate, self.key = certificate, key
        self._lock = threading.Lock()
        self._checked_at = time.monotonic()
        try:
            self._stamp, self._context = self._read_stamp(), self._load()
        except (OSError, ValueError) as error:
            raise SettingsError(f'WEBHOOK_TLS_CERT is "{certificate}" and WEBHOOK_TLS_KEY "{key}": {error}; '
                                "expected a PEM certificate (with its chain) and the key that belongs to it") from None

    def context(self) -> ssl.SSLContext:
        """The context for a new connection; looks for renewed files at most once a second."""
        if time.monotonic() - self._checked_at >= self.CHECK_SECONDS and self._lock.acquire(blocking=False):
            try:
                self._checked_at = time.monotonic()
                stamp = self._read_stamp()
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._context = self._load()
                    logger.warning("the renewed certificate %s is in use", self.certificate)
            except (OSError, ValueError) as error:
                logger.error("the renewed certificate %s cannot be used with its key (%s); the old one stays in use",
                             self.certificate, error)
            finally:
                self._lock.release()
        return self._context

    def _read_stamp(self) -> list[tuple[int, int, int]]:
        stats = [os.stat(path) for path in (self.certificate, self.key)]
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key, password=lambda: "")  # rather than ask on the terminal
        return context


class WebhookServer(http.server.ThreadingHTTPServer):
    """Listens on the webhook port; a thread for each connection."""

    request_queue_size = 128
    max_connections = 256
    # On Windows it would let a second copy take the same port.
    allow_reuse_address = os.name != "nt"
    allow_reuse_port = False

    receiver: Receiver  # to be set before serve_forever()

    def __init__(self, host: str, port: int, base_path: str = "", tls: TlsFiles | None = None) -> None:
        """Bind `host` and `port` (0: any free one). Raises OSError."""
        self.health_paths = {"/healthz", base_path + "/healthz"}
        self.tls = tls
        self.instance = os.urandom(8).hex()
        self.stopping = False
        self._condition = threading.Condition()  # guards the connections
        self._connections: dict[socket.socket, Connection] = {}
        self._throttle = Throttle()
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        super().__init__(address, WebhookRequestHandler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        # HTTPServer's own looks up the name of the address, which can take long.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises OSError."""
        try:
            return super().get_request()
        except OSError as error:  # no file descriptor is left, mostly
            self._make_room(str(error))
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread; at the cap, make room first."""
        with self._condition:
            while not self.stopping:
                held = [connection for connection in self._connections.values() if not connection.is_lost]
                if len(held) < self.max_connections:
                    break
                if not any(connection.is_cut for connection in held):
                    self._evict()
                self._condition.wait(0.05)
                self.service_actions()
            self._connections[request] = Connection(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            self._make_room(str(error))
            self.shutdown_request(request)

    def _make_room(self, reason: str) -> None:
        """After a failure to accept: close one, and pause, or it would be tried again at once and forever."""
        self._throttle.warn("accept", f"a connection could not be accepted: {reason}; the longest-waiting one is closed")
        with self._condition:
            self._evict()
        time.sleep(0.05)

    def _evict(self) -> None:
        """Cut the connection that has waited longest; none of which a request is in flight."""
        waiting = [connection for connection in self._connections.values() if not connection.in_flight and not connection.is_cut]
        if waiting:
            min(waiting, key=lambda connection: connection.since).cut()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection whose thread is done, or could not be started."""
        with self._condition:
            connection = self._connections.pop(request, None)
            self._condition.notify_all()
        super().shutdown_request(connection.sock if connection else request)

    def state_of(self, request: Any) -> Connection:
        """What is known of a connection that has been accepted."""
        with self._condition:
            return self._connections[request]

    def switch(self, connection: Connection, sock: socket.socket) -> bool:
        """Have `sock` stand for the connection from now on; whether it has not been cut yet."""
        with self._condition:
            connection.sock = sock
            return not connection.is_cut

    def lose(self, connection: Connection) -> None:
        """Count a connection no longer, whose thread is lost to your code."""
        with self._condition:
            connection.cut()
            connection.is_lost = True
            self._condition.notify_all()

    def begin(self, connection: Connection) -> bool:
        """Whether the complete request may be processed: it is not once the connection has been cut."""
        with self._condition:
            connection.in_flight = not (self.stopping or connection.is_cut)
            connection.deadline = math.inf  # your code has a limit of its own
            return connection.in_flight

    def end(self, connection: Connection) -> None:
        """The request has its reply."""
        with self._condition:
            connection.in_flight = False
            connection.since = time.monotonic()
            if self.stopping:
                self._condition.notify_all()

    def service_actions(self) -> None:
        """Cut what is past its deadline; serve_forever calls this between two connections."""
        now = time.monotonic()
        with self._condition:
            for connection in [known for known in self._connections.values() if known.deadline < now]:
                # While a request is read, the way for a 408 stays open.
                connection.cut(socket.SHUT_RDWR if connection.in_flight or connection.is_cut else socket.SHUT_RD)

    def stop(self, seconds: float) -> None:
        """Close what is incomplete, let what is in flight finish for up to `seconds`, end serve_forever."""
        with self._condition:
            self.stopping = True
            for connection in self._connections.values():
                if not connection.in_flight:
                    connection.cut(socket.SHUT_RD)  # what has come whole still gets its 503
            known = self._connections.values()
            self._condition.wait_for(lambda: not any(one.in_flight and one.deadline == math.inf for one in known), seconds)
            # A client that does not take its reply is not waited for.
            self._condition.wait_for(lambda: not any(one.in_flight for one in known), 0.2)
        self.shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away leaves an OSError, which is no news; so does a failed TLS handshake.
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("an error in this program; a connection was closed")


# ------------------------------------------------------------------------------------------
# Serving
# Output that never blocks, the start and the stop.
# ------------------------------------------------------------------------------------------

# Control characters could steer the terminal; bidi controls make text read as what it is not.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\xad\ufeff\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """`text` with control and bidi characters escaped, but those in `keep`: safe on a terminal, in one line."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


STOP_SECONDS = REPLY_BUDGET_SECONDS + 0.1  # for what is in flight; the call log has a second more


class Console(io.TextIOBase):
    """Stands before a real stream: a write never blocks, whole lines are written by one thread.

    Past `lines` that nobody takes off the real stream, lines are dropped and counted.
    """

    def __init__(self, stream: TextIO, lines: int = 5_000) -> None:
        super().__init__()
        self.stream, self.lines = stream, lines
        # The unbuffered stream: a thread stuck in the buffered one would hold its lock at the exit.
        self._raw = getattr(getattr(stream, "buffer", None), "raw", None)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._partial = threading.local()  # print() writes the text and the line feed one by one
        self._dropped = 0
        threading.Thread(target=self._work, name="console", daemon=True).start()

    def write(self, text: str) -> int:
        whole, feed, rest = (getattr(self._partial, "text", "") + text).rpartition("\n")
        self._partial.text = rest
        if feed:
            self._put(whole + feed)
        return len(text)

    def flush(self) -> None:
        rest, self._partial.text = getattr(self._partial, "text", ""), ""
        if rest:
            self._put(rest)

    def drain(self, seconds: float) -> None:
        """Wait up to `seconds` until all that was written so far is out."""
        self.flush()
        out = threading.Event()
        self._queue.put(out)
        out.wait(seconds)

    def reconfigure(self, **options: Any) -> None:
        """Nothing: the real stream's ways are kept."""

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def _put(self, text: str) -> None:
        if self._queue.qsize() < self.lines:
            self._queue.put(text)
        else:
            self._dropped += 1

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            self._write("".join(item for item in batch if isinstance(item, str)))
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._write(f"({dropped} lines were dropped here: nobody took them)\n")
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            time.sleep(0.01)  # or each line of a busy hour would wake this thread, and cost the calls time

    def _write(self, text: str) -> None:
        rest = printable(text, keep="\n\t").encode(self.encoding or "utf-8", "backslashreplace")
        try:
            if self._raw is None:
                self.stream.write(rest.decode(self.encoding or "utf-8"))
            while self._raw is not None and rest:
                written = self._raw.write(rest)
                if written is None:  # a non-blocking stream that is full
                    time.sleep(0.05)
                rest = rest[written or 0:]
        except (OSError, ValueError):  # nobody is there any more: the calls matter, not their lines
            pass


class DiagnosticFormatter(logging.Formatter):
    """One line for a message, whatever text from the network is in it; a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        where: str = getattr(record, "where", "")
        return super().formatMessage(record) + ("\n" + where.rstrip("\n") if where else "")

    def formatException(self, ei: Any) -> str:
        # Indented, so that a line feed in an error's text cannot begin what looks like a message.
        return textwrap.indent(super().formatException(ei), "    ")


def rfc3339(moment: float) -> str:
    """Unix time as RFC 3339 in UTC, with milliseconds."""
    whole, thousandths = divmod(round(moment * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{thousandths:03}Z"


def duration(seconds: float) -> str:
    """Seconds as 1:32, or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def event_line(event: CallEvent) -> str:
    """The sentence that is printed for an event."""
    def known(*values: str) -> str:
        return printable(next(filter(None, values), "[unknown]"))

    if isinstance(event, NewCallEvent):
        return f"New call from {known(event.from_number)} to {known(event.to_number)} is ringing..."
    if isinstance(event, AnswerEvent):
        return f"{known(event.user, event.answering_number)} answered call from {known(event.from_number)}"
    if isinstance(event, HangupEvent):
        remarks = [printable(event.cause)] if event.cause else []
        if event.call and event.call.ended:
            answered = event.call.talk_s is not None
            remarks.append(f"talked {duration(event.call.talk_s)}" if answered else
                           f"{event.call.outcome} after {duration(event.call.wait_s)}")
        return "The call has been hung up" + (f" ({', '.join(remarks)})" if remarks else "")
    if isinstance(event, DtmfEvent):
        return f"{known(event.call.from_number if event.call else '')} pressed {known(event.dtmf)}"
    return f"Unknown event {known(event.event)}"


def event_json(event: CallEvent, received_at: float) -> str:
    """An event as one JSON object, in sipgate's field names and in ASCII."""
    entry: dict[str, Any] = {"received_at": rfc3339(received_at), "event": event.event}
    if isinstance(event, NewCallEvent):
        entry.update((wire, list(getattr(event, python))) for wire, python in LIST_FIELDS.items())
    for key, values in event.fields.items():
        if not (isinstance(event, NewCallEvent) and _list_name(key)) and entry.get(key) in (None, []):
            entry[key] = values[0] if len(values) == 1 else list(values)
    return json.dumps(entry)


def show_on(stream: TextIO, form: str) -> Callable[[CallEvent, float], None]:
    """Return what prints an event on `stream` in the form that CALL_OUTPUT names."""
    clock_first = stream.isatty()

    def show(event: CallEvent, received_at: float) -> None:
        if form == "json":
            stream.write(event_json(event, received_at) + "\n")
        elif form == "text":
            moment = time.strftime("%H:%M:%S ", time.localtime(received_at)) if clock_first else ""
            stream.write(moment + event_line(event) + "\n")
    return show


def likely(name: str, names: Sequence[str]) -> str:
    """The one of `names` that `name` is a slip of the pen for, "" if it looks like none."""
    import difflib  # seldom needed, and each import delays the start
    return "".join(difflib.get_close_matches(name, names, 1, 0.8))


def load_functions(path: str) -> CallFunctions:
    """Return the functions of the file CALL_HANDLERS names, ours where it has none.

    Runs that file. Raises SettingsError that names file, line and error.
    """
    if not path:
        return CallFunctions()
    spec = importlib.util.spec_from_file_location("call_handlers", path)
    if spec is None or spec.loader is None:
        raise SettingsError(f'CALL_HANDLERS is "{path}": expected the name of a Python file, ending in .py')
    module = importlib.util.module_from_spec(spec)
    sys.modules["call_handlers"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # noqa: BLE001 - sys.exit() in the file included
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else lines[-1] if lines else None
        text = error.msg if isinstance(error, SyntaxError) else error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(f'CALL_HANDLERS is "{path}": ' + (f"line {line}: " if line else "")
                            + printable(f"{type(error).__name__}: {text}")) from None
    names = CallFunctions._fields
    for name in vars(module):
        if name not in names and likely(name, names):
            logger.warning("%s: %s is never called; is %s meant?", path, name, likely(name, names))
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if not found:
        raise SettingsError(f'CALL_HANDLERS is "{path}": expected one of {", ".join(names)} in it')
    for name, function in found.items():
        try:
            inspect.signature(function).bind(CallEvent())
        except (TypeError, ValueError):
            raise SettingsError(f'CALL_HANDLERS is "{path}": {name} has to be a function of one argument, the event') from None
        if inspect.iscoroutinefunction(function):
            raise SettingsError(f'CALL_HANDLERS is "{path}": {name} has to be a plain function, without async')
    return CallFunctions(**found)


def load_keys(path: str) -> list[PublicKey]:
    """Return sipgate's key, and the one in the file SIGNATURE_KEY_FILE names. Raises SettingsError."""
    keys = [PublicKey.from_pem(SIPGATE_PUBLIC_KEY)]
    if path:
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                keys.append(PublicKey.from_pem(file.read()))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f'SIGNATURE_KEY_FILE is "{path}": {reason}') from None
    return keys


def bind_advice(error: Exception, settings: Settings) -> str:
    """One line that says why nothing can listen there, and what to do."""
    port, host = settings.webhook_port, settings.webhook_host
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        advice = f"another program has this port, or another copy of this one; stop it or use --port {port % 65535 + 1}"
    elif number == errno.EACCES and port < 1024:
        advice = f"ports below 1024 need privileges; use --port 8080 and let a proxy listen on {port}"
    elif number == errno.EADDRNOTAVAIL or isinstance(error, (socket.gaierror, UnicodeError)):
        advice = "this machine has no such address; set WEBHOOK_HOST to 127.0.0.1, or to 0.0.0.0 for all of them"
    else:
        advice = "check WEBHOOK_HOST and WEBHOOK_PORT"
    return f"cannot listen on {host} port {port}: {getattr(error, 'strerror', error)}: {advice}"


TRIAL_STEPS = """\
sipgate_callevents {version} listens on {host}:{port}, for trials on this machine
Your first real call:
  1. Book sipgate.io for your account (the smallest package will do).
  2. In a second terminal, open a tunnel:
       ssh -R 80:127.0.0.1:{port} ssh.localhost.run
  3. Restart this program with the https address that the tunnel prints, and
     a secret path:
       python3 {script}{flags} \\
         --url https://ADDRESS/{secret}
  4. At https://console.sipgate.com, Webhooks > URLs, enter as incoming URL:
       https://ADDRESS/{secret}/new-call
  5. There under Webhooks > Sources, choose the phone lines that send webhooks.
  6. Call your number.
{kept}Waiting for calls. Ctrl-C stops.
"""

LIVE_LINES = """\
sipgate_callevents {version} listens on {host}:{port}
Enter this URL at https://console.sipgate.com, Webhooks > URLs:
  {url}/new-call
{signatures}
{kept}Waiting for calls. Ctrl-C stops.
"""

SIGNATURES = {
    "auto": "Signatures are checked: a newCall that sipgate did not sign is refused.",
    "on": "Signatures are checked: any event that sipgate did not sign is refused.",
    "off": "Signatures are NOT checked (VERIFY_SIGNATURE=off)."}


def notify_ready() -> None:
    """Tell systemd that we are up (sd_notify(3)); nothing where there is none."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path and hasattr(socket, "AF_UNIX"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            try:
                notify.sendto(b"READY=1", "\0" + path[1:] if path.startswith("@") else path)
            except OSError as error:
                logger.warning("NOTIFY_SOCKET: %s", error)


def catch_signals() -> queue.SimpleQueue[int]:
    """Return the queue in which SIGINT, SIGTERM or SIGHUP will arrive; the second ends the process at once."""
    # A SimpleQueue may be put into by a signal handler; an Event could deadlock there.
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

    def on_signal(number: int, frame: Any) -> None:
        if stopping:
            os._exit(128 + number)
        stopping.append(number)
        arrived.put(number)

    stopping: list[int] = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, and means it.
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, on_signal)
    return arrived


def wait_for(arrived: queue.SimpleQueue[int]) -> None:
    """Wait until a signal is in the queue, in steps: Windows would not see Ctrl-C otherwise."""
    while True:
        try:
            arrived.get(timeout=0.5)
            return
        except queue.Empty:
            pass


def start_text(settings: Settings, call_log: CallLog | None) -> str:
    """What a person needs next."""
    kept = "".join(f"{what}\n  {path}\n" for what, path in (
        ("Calls are decided by", settings.call_handlers), ("A further key is in", settings.signature_key_file),
        ("The certificate is", settings.webhook_tls_cert)) if path)
    if not call_log:
        kept += "No numbers are kept (CALL_LOG=off).\n"
    else:
        kept += (f"Numbers of the last {call_log.days} days are in\n  {call_log.path}\n"
                 f"({call_log.count()} events); CALL_LOG=off keeps nothing.\n")
    host = f"[{settings.webhook_host}]" if ":" in settings.webhook_host else settings.webhook_host
    return (TRIAL_STEPS if settings.trial else LIVE_LINES).format(
        version=__version__, host=host, port=settings.webhook_port, url=settings.webhook_url,
        flags="" if settings.webhook_port == Settings.webhook_port else f" --port {settings.webhook_port}",
        secret=os.urandom(8).hex(), kept=kept, script=os.path.basename(__file__), signatures=SIGNATURES[settings.verify_signature])


def serve(settings: Settings, extension: Extension | None = None) -> int:
    """Receive webhooks until a signal comes; return the exit status. Raises SettingsError."""
    show = show_on(sys.stdout, settings.call_output)
    if settings.call_output == "json":
        sys.stdout = sys.stderr  # stdout is for events alone; what your code prints goes here
    for warning in settings.warnings():
        logger.warning("%s", warning)
    keys, functions = load_keys(settings.signature_key_file), load_functions(settings.call_handlers)
    arrived = catch_signals()
    tls = TlsFiles(settings.webhook_tls_cert, settings.webhook_tls_key) if settings.webhook_tls_cert else None
    try:
        server = WebhookServer(settings.webhook_host, settings.webhook_port, settings.base_path, tls)
    except (OSError, UnicodeError) as error:
        print(f"sipgate_callevents: {bind_advice(error, settings)}", file=sys.stderr)
        return 1
    with server:
        settings = replace(settings, webhook_port=server.server_port)
        call_log = None if settings.call_log == "off" else CallLog(settings.call_log, settings.call_log_days,
                                                                   extension=extension)
        server.receiver = Receiver(settings, keys, functions, show, call_log=call_log)
        threading.Thread(target=server.serve_forever, args=(0.05,), name="accept", daemon=True).start()
        sys.stderr.write(start_text(settings, call_log))
        notify_ready()
        wait_for(arrived)
        deadline = time.monotonic() + STOP_SECONDS
        server.stop(STOP_SECONDS)
    left = server.receiver.follow_ups.finish(max(deadline - time.monotonic(), 0.1))
    if left:
        logger.warning("events left to your on_answer and on_hangup when they were stopped: %d", left)
    if call_log:
        call_log.close(max(deadline - time.monotonic(), 0) + 1)
    print("Stopped.", file=sys.stderr)
    return 0


# ==========================================================================================
# PART II: LOOKS AT THE LOG
# Comfort. Nothing here stands between a newCall and its reply; with all of it cut off, Part I
# still serves.
# ==========================================================================================

# ------------------------------------------------------------------------------------------
# Calls
# From the events of legs to calls as people see them: kept up to date in the transaction that
# stores an event, and rebuilt from the events where that has not happened.
# ------------------------------------------------------------------------------------------

CALLS_VERSION = 1  # of the rules too: with another one, calls are put together anew
CALLS_TABLES = ("derived", "legs", "links", "calls")
CALLS_SCHEMA = """
CREATE TABLE derived(version INTEGER, up_to INTEGER);  -- the last event that has been taken in
CREATE TABLE legs(call_id TEXT PRIMARY KEY, call INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE links(key TEXT, received_at REAL, call_id TEXT, PRIMARY KEY(key, received_at, call_id)) WITHOUT ROWID;
CREATE INDEX links_received_at ON links(received_at);
CREATE TABLE calls(id INTEGER PRIMARY KEY, started REAL, last_at REAL, outcome TEXT,
                   from_number TEXT, to_number TEXT, numbers TEXT, fields TEXT);
CREATE INDEX calls_started ON calls(started);
CREATE INDEX calls_from ON calls(from_number, started);
CREATE INDEX calls_to ON calls(to_number, started);
"""
NUMBER_FIELDS = ("from_number", "to_number", "diversion", "answering_number")
LINK_SECONDS = 24 * 3600  # two events with the same xcid belong together if they are no further apart
LOST_SECONDS = 6 * 3600  # after the last event, a call whose end was not reported is lost
FORWARD_SECONDS = 60  # that a forwarded leg waits for the next one


@dataclass(frozen=True)
class Call:
    """A phone call over all its legs. Times are Unix times of ours, None where not known (yet).

    `outcome`: ringing, talking, answered, voicemail, forwarded, missed, unanswered, lost.
    `wait_s` and `talk_s` are seconds; `digits` are those pressed, joined by commas.
    """

    direction: str
    from_number: str
    to_number: str
    users: tuple[str, ...]
    answered_by: str
    started: float
    answered: float | None
    ended: float | None
    wait_s: float | None
    talk_s: float | None
    outcome: str
    cause: str
    digits: str
    legs: tuple[str, ...]


class _Leg:
    """The events of one callId, earliest first."""

    def __init__(self, call_id: str) -> None:
        self.call_id = call_id
        self.events: list[tuple[float, CallEvent]] = []

    def first(self, kind: type[CallEvent]) -> tuple[float, Any] | None:
        return next(((at, event) for at, event in self.events if isinstance(event, kind)), None)

    def text(self, name: str) -> str:
        """The field `name` of the newCall, else of the first event that has it."""
        ordered = sorted(self.events, key=lambda pair: not isinstance(pair[1], NewCallEvent))
        return next(filter(None, (getattr(event, name, "") for _, event in ordered)), "")

    def is_voicemail(self, event: AnswerEvent) -> bool:
        """Whether voicemail answered: it says so, or nobody is named and nothing else rang."""
        started = self.first(NewCallEvent)
        rang = {user for user in started[1].users if user} if started else set()
        return event.user == "voicemail" or (not event.user and rang == {"voicemail"})


def put_together(events: Sequence[tuple[float, CallEvent]]) -> Call:
    """Return the call that `events` (time, event) make up, in whatever order they are given.

    The outcome is what the events say; what time decides is added by `seen_at`.
    """
    legs: dict[str, _Leg] = {}
    order = {kind: rank for rank, kind in enumerate(EVENTS)}
    for at, event in sorted(events, key=lambda pair: (pair[0], order.get(pair[1].event, 9), pair[1].call_id,
                                                      str(sorted(pair[1].fields.items())))):
        legs.setdefault(event.call_id, _Leg(event.call_id)).events.append((at, event))
    named = {getattr(event, "orig_call_id", "") for leg in legs.values() for _, event in leg.events
             if getattr(event, "orig_call_id", "") != leg.call_id}
    first = next((leg for leg in legs.values() if leg.call_id in named), next(iter(legs.values())))
    answers = sorted(((at, leg.is_voicemail(event), event) for leg in legs.values() for at, event in leg.events
                      if isinstance(event, AnswerEvent)), key=lambda answer: answer[0])
    by_people = [(at, event) for at, is_voicemail, event in answers if not is_voicemail]
    hangups = [leg.first(HangupEvent) for leg in legs.values()]
    ends = [hangup for hangup in hangups if hangup]
    is_over = len(ends) == len(legs)
    causes = [event.cause for _, event in sorted(ends, key=lambda end: (end[0], end[1].call_id))]
    started = min(leg.events[0][0] for leg in legs.values())
    answered = by_people[0][0] if by_people else None
    ended = max(at for at, _ in ends) if is_over else None
    direction = first.text("direction")
    if not is_over:
        outcome = "talking" if by_people else "ringing"
    elif by_people:
        outcome = "answered"
    elif answers:
        outcome = "voicemail"
    elif all(cause == "forwarded" for cause in causes):
        outcome = "forwarded"
    else:
        outcome = "unanswered" if direction == "out" else "missed"
    wait_end = answered if answered is not None else ended
    rang = [user for leg in legs.values() for _, event in leg.events if isinstance(event, NewCallEvent)
            for user in event.users if user not in ("", "voicemail")]
    pressed = sorted(((at, event.dtmf) for leg in legs.values() for at, event in leg.events
                      if isinstance(event, DtmfEvent) and event.dtmf not in ("", "-1")), key=lambda digits: digits[0])
    return Call(
        direction, first.text("from_number"), first.text("to_number"), tuple(dict.fromkeys(rang)),
        (by_people[0][1].user or by_people[0][1].answering_number) if by_people else "", started, answered, ended,
        max(wait_end - started, 0.0) if wait_end is not None else None,
        max(ended - answered, 0.0) if ended is not None and answered is not None else None,
        outcome, next((cause for cause in reversed(causes) if cause != "forwarded"), causes[-1] if causes else ""),
        ",".join(digits for _, digits in pressed), tuple(call_id for call_id in legs if not call_id.startswith("#")))


def seen_at(call: Call, last_at: float, now: float) -> Call:
    """`call`, whose last event came at `last_at`, as it stands at the Unix time `now`."""
    if call.outcome in ("ringing", "talking") and now - last_at >= LOST_SECONDS:
        return replace(call, outcome="lost")
    if call.outcome == "forwarded" and now - last_at < FORWARD_SECONDS:
        return replace(call, outcome="ringing", ended=None, wait_s=None)
    return call


def prepare_calls(connection: sqlite3.Connection) -> None:
    """Have the tables of calls, empty ones if they follow other rules."""
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    if "derived" in tables and connection.execute("SELECT version FROM derived").fetchone() == (CALLS_VERSION,):
        return
    for table in tables & set(CALLS_TABLES):
        connection.execute(f"DROP TABLE {table}")
    for statement in CALLS_SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute("INSERT INTO derived VALUES (?, 0)", (CALLS_VERSION,))


def update_calls(connection: sqlite3.Connection, most: int) -> bool:
    """Take up to `most` events into the calls, in the caller's transaction; whether there are more."""
    up_to = connection.execute("SELECT up_to FROM derived").fetchone()[0]
    rows = connection.execute("SELECT id, received_at, event, call_id, body FROM events WHERE id > ? ORDER BY id LIMIT ?",
                              (up_to, most)).fetchall()
    for row in rows:
        _take_in(connection, *row)
    if rows:
        connection.execute("UPDATE derived SET up_to = ?", (rows[-1][0],))
    return len(rows) == most


def _stored_event(number: int, kind: str, body: bytes) -> tuple[str, CallEvent]:
    """The leg and the event of a stored row. Events without a callId, as in trial mode, are a leg each."""
    event = parse_event(body, kind)
    return (event.call_id, event) if event.call_id else (f"#{number}", replace(event, call_id=f"#{number}"))


def _take_in(connection: sqlite3.Connection, number: int, received_at: float, kind: str, call_id: str, body: bytes) -> None:
    """Find the call that an event belongs to, merge those that it links, and put it together anew."""
    leg, event = _stored_event(number, kind, body)
    orig, xcid = getattr(event, "orig_call_id", ""), getattr(event, "xcid", "")
    near = {leg, orig}
    near.update(row[0] for row in connection.execute("SELECT call_id FROM links WHERE key = ?", ("o" + leg,)))
    if orig not in ("", leg):
        connection.execute("INSERT OR IGNORE INTO links VALUES (?, ?, ?)", ("o" + orig, received_at, leg))
    if xcid:
        near.update(row[0] for row in connection.execute(
            "SELECT call_id FROM links WHERE key = ? AND received_at BETWEEN ? AND ?",
            ("x" + xcid, received_at - LINK_SECONDS, received_at + LINK_SECONDS)))
        connection.execute("INSERT OR IGNORE INTO links VALUES (?, ?, ?)", ("x" + xcid, received_at, leg))
    calls = sorted({row[0] for one in near for row in connection.execute("SELECT call FROM legs WHERE call_id = ?", (one,))})
    legs, numbers = {leg}, {number}
    for call in calls:
        its_legs, its_numbers = _parts_of(connection, call)
        legs.update(its_legs)
        numbers.update(its_numbers)
        if call != calls[0]:
            connection.execute("DELETE FROM calls WHERE id = ?", (call,))
    rows = _without_repeats(_rows_of(connection, numbers)) if calls else [(number, received_at, kind, call_id, body)]
    events = [(at, _stored_event(one, its_kind, its_body)[1]) for one, at, its_kind, _, its_body in rows]
    call, last_at = put_together(events), max(at for at, _ in events)
    key = calls[0] if calls else number
    known = {getattr(event, name, "") for _, event in events for name in NUMBER_FIELDS}
    connection.execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (
        key, call.started, last_at, call.outcome, call.from_number, call.to_number, f" {' '.join(sorted(known))} ",
        json.dumps([call.__dict__, sorted(legs), sorted(row[0] for row in rows)])))
    connection.executemany("INSERT OR REPLACE INTO legs VALUES (?, ?)", [(one, key) for one in legs])


def _parts_of(connection: sqlite3.Connection, call: int) -> tuple[list[str], list[int]]:
    """The legs of a call, and the numbers of its events."""
    _, legs, numbers = json.loads(connection.execute("SELECT fields FROM calls WHERE id = ?", (call,)).fetchone()[0])
    return legs, numbers


def _rows_of(connection: sqlite3.Connection, numbers: Iterable[int]) -> list[Any]:
    """The rows of events that are still there, in the order of recording."""
    found = (connection.execute("SELECT id, received_at, event, call_id, body FROM events WHERE id = ?", (number,)).fetchone()
             for number in sorted(numbers))
    return [row for row in found if row]


def _without_repeats(rows: Sequence[Any]) -> list[Any]:
    """`rows` but those that repeat an earlier one; a digit pressed twice is no repeat."""
    kept: dict[Any, Any] = {}
    for row in sorted(rows, key=lambda row: (row[1], row[0])):
        kept.setdefault(row[0] if row[2] == "dtmf" else row[2:], row)
    return list(kept.values())


def _events_of(connection: sqlite3.Connection, numbers: Iterable[int]) -> list[tuple[float, CallEvent]]:
    return [(at, _stored_event(number, kind, body)[1]) for number, at, kind, _, body in _rows_of(connection, numbers)]


def _as_call(fields: str, last_at: float, now: float) -> Call:
    """The call that a row of the table holds, as it stands `now`."""
    values, _, _ = json.loads(fields)
    call = Call(**{**values, "users": tuple(values["users"]), "legs": tuple(values["legs"])})
    return seen_at(call, last_at, now)


def call_of(connection: sqlite3.Connection, call_id: str) -> Call | None:
    """Return the call that the leg `call_id` belongs to, as it stands now."""
    row = connection.execute("SELECT fields, last_at FROM legs JOIN calls ON id = call WHERE call_id = ?", (call_id,)).fetchone()
    return _as_call(row[0], row[1], time.time()) if row else None


def remove_calls(connection: sqlite3.Connection, before: float) -> bool:
    """Put together anew, or take out, some calls that began before the Unix time `before`; whether there are more.

    Their old events have been deleted; what is left of them counts.
    """
    connection.execute("DELETE FROM links WHERE received_at < ?", (before,))  # or they would go on joining legs
    found = [row[0] for row in connection.execute("SELECT id FROM calls WHERE started < ? LIMIT 100", (before,))]
    for call in found:
        if connection.execute("SELECT 1 FROM calls WHERE id = ?", (call,)).fetchone():  # not merged meanwhile
            rebuild_call(connection, call)
    return bool(found)


def rebuild_call(connection: sqlite3.Connection, call: int) -> None:
    """Put one call together anew from the events that are left of it."""
    legs, numbers = _parts_of(connection, call)
    connection.execute("DELETE FROM calls WHERE id = ?", (call,))
    for leg in legs:
        connection.execute("DELETE FROM legs WHERE call_id = ?", (leg,))
    for row in _rows_of(connection, numbers):
        _take_in(connection, *row)


CALLS = Extension(prepare_calls, update_calls, remove_calls, call_of)


# ------------------------------------------------------------------------------------------
# Showing calls, and forgetting a number
# The commands `calls` and `forget`: on the same file as a running server, which they never
# block, and never on a file that is not there yet.
# ------------------------------------------------------------------------------------------

FORGOTTEN = "[forgotten]"


class Nothing(Exception):
    """There is nothing to show; the text says why, in a sentence."""


def open_calls(path: str) -> sqlite3.Connection:
    """Connect to the call log at `path` and bring its calls up to date. Raises Nothing, SettingsError."""
    if path == "off":
        raise Nothing("CALL_LOG=off: no calls are kept")
    try:
        is_empty = not os.stat(path).st_size
    except FileNotFoundError:
        is_empty = True
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}: run this as the user whom it belongs to") from None
    if is_empty:
        raise Nothing(f"no calls yet: there is nothing in {path}")
    if not os.access(path, os.R_OK | os.W_OK):
        command = " ".join(map(shlex.quote, [sys.executable, *sys.argv]))
        raise SettingsError(f"{path} belongs to {owner(path)}: sudo -u {owner(path)} {command}")
    try:
        connection = sqlite3.connect(pathlib.Path(path).as_uri() + "?mode=rw", uri=True, timeout=5, isolation_level=None)
    except sqlite3.Error as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    try:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise SettingsError(f'CALL_LOG is "{path}": that file is not a call log of this program')
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise SettingsError(f'CALL_LOG is "{path}": a newer version of this program wrote it')
        if version < SCHEMA_VERSION:
            raise Nothing(f"no calls yet: there is nothing in {path}")
        with transaction(connection):
            prepare_calls(connection)
        more = connection.execute("SELECT up_to < (SELECT max(id) FROM events) FROM derived").fetchone()[0]
        while more:
            began = time.monotonic()
            with transaction(connection):
                more = update_calls(connection, 100)
            time.sleep(time.monotonic() - began)  # so that a running server gets its turn
    except sqlite3.Error as error:
        connection.close()
        raise SettingsError(f"{path} cannot be read: {error}") from None
    except (Nothing, SettingsError):
        connection.close()
        raise
    return connection


def owner(path: str) -> str:
    """Name of the user whom the file belongs to."""
    try:
        return pathlib.Path(path).owner()
    except (KeyError, NotImplementedError, OSError):
        return "another user"


def find_calls(connection: sqlite3.Connection, now: float, *, missed: bool = False, since: float | None = None,
               number: str = "", limit: int = 20) -> list[tuple[Call, list[tuple[float, CallEvent]]]]:
    """Return the latest `limit` calls, newest last, each with time and event of all that is stored for it.

    With `missed`, those to ring back: missed, or with voicemail only, and not spoken to since.
    `number` is a pattern of digits and *, for the caller or the called party; a whole number is
    also found where it was dialled first or answered.
    """
    where, values = ["1"], []  # type: tuple[list[str], list[Any]]
    if missed:
        where.append("outcome IN ('missed', 'voicemail')")
        for side in ("from_number", "to_number"):
            where.append(f"(from_number IN ('', 'anonymous', '{FORGOTTEN}') OR NOT EXISTS (SELECT 1 FROM calls AS later WHERE later.{side} = "
                         "calls.from_number AND later.started > calls.started AND later.outcome IN ('answered', 'talking')))")
    if since is not None:
        where.append("started >= ?")
        values.append(since)
    if number:
        where.append("(from_number GLOB ? OR to_number GLOB ? OR instr(numbers, ?))")
        values += [number, number, f" {number} "]
    rows = connection.execute(f"SELECT fields, last_at FROM calls WHERE {' AND '.join(where)} "
                              "ORDER BY started DESC, id DESC LIMIT ?", (*values, limit)).fetchall()
    return [(_as_call(fields, last_at, now), sorted(_events_of(connection, json.loads(fields)[2]), key=lambda pair: pair[0]))
            for fields, last_at in reversed(rows)]


def with_plus(number: str) -> str:
    """A number as people write it."""
    return "+" + number if re.fullmatch("[1-9][0-9]{6,}", number) else number or "unknown"


def cell(text: str, width: int) -> str:
    """`text` safe on a terminal, in exactly `width` columns; characters of the far east take two."""
    shown, taken = "", 0
    for character in printable(text):
        taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if taken > width:
            break
        shown += character
    return shown + " " * (width - sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in shown))


def table(calls: Sequence[Call], width: int) -> list[str]:
    """`calls` as lines of up to `width` columns, of 80 at least."""
    rows = [("STARTED", "", "FROM", "TO", "OUTCOME", "WAIT", "TALK", "BY")]
    for call in calls:
        wait, talk = ("" if seconds is None else duration(seconds) for seconds in (call.wait_s, call.talk_s))
        rows.append((time.strftime("%m-%d %H:%M", time.localtime(call.started)), call.direction, with_plus(call.from_number),
                     with_plus(call.to_number), call.outcome, wait.rjust(4), talk.rjust(4), call.answered_by))
    widths = [min(max(len(row[column]) for row in rows), most) for column, most in enumerate((11, 3, 16, 16, 10, 7, 7))]
    widths.append(max(width, 80) - sum(widths) - len(widths))
    return [" ".join(map(cell, row, widths)).rstrip() for row in rows]


def totals(calls: Sequence[Call]) -> str:
    """One line that sums `calls` up."""
    def average(seconds: list[float]) -> str:
        return duration(sum(seconds) / len(seconds)) if seconds else "-"

    outcomes = [call.outcome for call in calls]
    waits = [call.wait_s for call in calls if call.wait_s is not None]
    talks = [call.talk_s for call in calls if call.talk_s is not None]
    return (f"{len(calls)} call{'s' if len(calls) != 1 else ''}, {outcomes.count('answered')} answered, "
            f"{outcomes.count('missed')} missed, average wait {average(waits)}, average talk {average(talks)}")


def call_entry(call: Call) -> dict[str, Any]:
    """A call as the values of its JSON: raw, times in RFC 3339 and UTC, null for what is not known."""
    entry: dict[str, Any] = {"from" if name == "from_number" else "to" if name == "to_number" else name: value
                             for name, value in call.__dict__.items()}
    for name in ("started", "answered", "ended"):
        entry[name] = None if entry[name] is None else rfc3339(entry[name])
    for name in ("wait_s", "talk_s"):
        entry[name] = None if entry[name] is None else round(entry[name], 3)
    return {name: None if value == "" else list(value) if isinstance(value, tuple) else value for name, value in entry.items()}


def csv_cell(value: Any) -> Any:
    """`value` safe in a spreadsheet: text that it would take for a formula or a number gets an apostrophe."""
    if isinstance(value, float) or value is None:
        return value
    text = " ".join(value) if isinstance(value, list) else value
    is_time = re.fullmatch(r"[0-9-]{10}T[0-9:.]{12}Z", text)
    return "'" + text if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|\s*[0-9]", text) and not is_time else text


def show_calls(options: argparse.Namespace, settings: Settings) -> int:
    """The command `calls`."""
    since = None
    if options.since is not None:
        try:
            since = datetime.datetime.fromisoformat(options.since).timestamp()
        except ValueError:
            raise SettingsError(f'--since is "{options.since}": expected a date such as 2026-11-01') from None
    number = re.sub(r"[\s()/+-]", "", options.number)
    if not re.fullmatch("[0-9A-Za-z*]+", number or ("" if options.number else "*")):
        raise SettingsError(f'--number is "{options.number}": expected digits, with * for any others')
    with contextlib.closing(open_calls(settings.call_log)) as connection:
        found = find_calls(connection, time.time(), missed=options.missed, since=since, number=number, limit=options.limit)
    if not found:
        raise Nothing("no call matches" if options.missed or since or number else f"no calls yet in {settings.call_log}")
    calls, events = zip(*found)
    if options.format == "json":
        for call, its_events in zip(calls, events):
            entry = call_entry(call)
            if options.events:
                entry["events"] = [json.loads(event_json(event, at)) for at, event in its_events]
            print(json.dumps(entry))
    elif options.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(call_entry(calls[0]))
        writer.writerows([csv_cell(value) for value in call_entry(call).values()] for call in calls)
    else:
        head, *lines = table(calls, shutil.get_terminal_size().columns)
        print(head)
        for line, its_events in zip(lines, events):
            print(line)
            for at, event in its_events if options.events else ():
                print(f"  {time.strftime('%H:%M:%S', time.localtime(at))} {printable(event.event):7} {event_line(event)}")
        print(totals(calls))
    return 0


def forget_number(options: argparse.Namespace, settings: Settings) -> int:
    """The command `forget`: every trace of a number leaves the files."""
    number, path = plain_number(options.number), settings.call_log
    if not re.fullmatch("[0-9][0-9A-Za-z]{2,}", number):
        raise SettingsError(f'"{options.number}": expected the digits of a whole number, such as 4915791234567')
    try:
        for damaged in filter(os.path.isfile, glob.glob(glob.escape(path) + ".damaged-*")):
            if number.encode() in pathlib.Path(damaged).read_bytes():
                os.remove(damaged)
                print(f"{damaged} held that number, and is removed", file=sys.stderr)
        with contextlib.closing(open_calls(path)) as connection:
            connection.execute("PRAGMA secure_delete=ON")
            found = forget_in(connection, number)
            connection.execute("VACUUM")
            connection.execute("PRAGMA busy_timeout=0")  # a running server is not to wait for a reader as well
            until = time.monotonic() + 60
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > until:
                    raise SettingsError(f"{path}-wal still holds it, since another program reads the file: end that, run this again")
                time.sleep(0.1)
    except (sqlite3.Error, OSError) as error:
        raise SettingsError(f"{path}: {error}; run this again") from None
    print(f"{found} call{'s' if found != 1 else ''} held that number; it is gone from {path}")
    return 0


def plain_number(text: str) -> str:
    """A number without what people write into it, or the part of a SIP address before the @."""
    return re.sub(r"[\s()/+-]", "", text).partition("@")[0]


def forget_in(connection: sqlite3.Connection, number: str) -> int:
    """Rewrite every event that has `number` as a whole value, and the calls of these; return how many calls."""
    # One word for all places where it stands as an id, so that what it joins stays joined, and nothing else is.
    token = f"{FORGOTTEN[:-1]} {os.urandom(4).hex()}]"
    calls: set[int] = set()
    rows, last = [], 0
    query = "SELECT id, call_id, body FROM events WHERE id > ?"
    for key, call_id, body in connection.execute(query, (0,)):  # reading only, which no writer waits for
        last = max(last, key)
        if number in plain_number(call_id) or number in plain_text(body):
            rows.append((key, call_id, body))
    with transaction(connection):
        while update_calls(connection, 1000):
            pass
        for key, call_id, body in rows + connection.execute(query, (last,)).fetchall():
            pairs = urllib.parse.parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)
            kept = [(name, _forgotten(name, value, number, token)) for name, value in pairs]
            if kept != pairs:
                calls.update(connection.execute("SELECT call FROM legs WHERE call_id = ?", (call_id or f"#{key}",)).fetchone() or ())
                # The digest told repeats of these very bytes, and could tell whether a guess at them is right.
                connection.execute("UPDATE events SET body = ?, digest = NULL, call_id = ? WHERE id = ?", (
                    urllib.parse.urlencode(kept).encode(), _forgotten("callId", call_id, number, token), key))
        connection.execute("DELETE FROM links WHERE key IN (?, ?) OR call_id = ?", ("x" + number, "o" + number, number))
        for call in calls:
            if connection.execute("SELECT 1 FROM calls WHERE id = ?", (call,)).fetchone():
                rebuild_call(connection, call)
    return len(calls)


def plain_text(body: bytes) -> str:
    """A form's text, decoded and without what people write into numbers."""
    return re.sub(r"[\s()/+-]", "", urllib.parse.unquote_plus(body.decode("utf-8", "replace")))


def _forgotten(name: str, value: str, number: str, token: str) -> str:
    if name in ("event", "direction", "cause") or plain_number(value) != number:
        return value
    return token if name in ("callId", "origCallId", "xcid") else FORGOTTEN


# ------------------------------------------------------------------------------------------
# Rehearsal
# The command `simulate`: the script plays sipgate, over real HTTP, and is strict where sipgate
# is silent. What it knows of the receiver is its address.
# ------------------------------------------------------------------------------------------

class Step(NamedTuple):
    """An event of a scenario: of which leg, and its fields beyond those of the call."""

    event: str
    leg: str
    fields: Mapping[str, Any] = {}


FORWARDED = (Step("newCall", "A"), Step("hangup", "A", {"cause": "forwarded"}),
             Step("newCall", "B", {"user[]": ["voicemail"], "userId[]": [], "fullUserId[]": []}))
SCENARIOS: dict[str, tuple[Step, ...]] = {
    "answered": (Step("newCall", "A"), Step("answer", "A"), Step("hangup", "A")),
    "missed": (Step("newCall", "A"), Step("hangup", "A", {"cause": "cancel"})),
    "busy": (Step("newCall", "A"), Step("hangup", "A", {"cause": "busy"})),
    "declined": (Step("newCall", "A"), Step("hangup", "A", {"cause": "noAnswer"})),
    "group": (Step("newCall", "A", {"user[]": ["Alice", "Bob", "Carl"], "userId[]": ["w0", "w1", "w2"],
                                    "fullUserId[]": ["1234567w0", "1234567w1", "1234567w2"]}),
              Step("answer", "A", {"user": "Bob", "userId": "w1", "fullUserId": "1234567w1"}), Step("hangup", "A")),
    "anonymous": (Step("newCall", "A", {"from": "anonymous"}), Step("answer", "A", {"from": "anonymous"}),
                  Step("hangup", "A", {"from": "anonymous"})),
    "outgoing": (Step("newCall", "A", {"direction": "out"}), Step("answer", "A", {"direction": "out"}),
                 Step("hangup", "A", {"direction": "out"})),
    "voicemail": (*FORWARDED, Step("answer", "B", {"user": "voicemail"}), Step("hangup", "B")),
    "transfer": (Step("newCall", "A"), Step("answer", "A"),
                 Step("newCall", "B", {"user[]": ["Carl"], "userId[]": ["w2"], "fullUserId[]": ["1234567w2"]}),
                 Step("answer", "B", {"user": "Carl", "userId": "w2", "fullUserId": "1234567w2"}),
                 Step("hangup", "A"), Step("hangup", "B")),
    "menu": (Step("newCall", "A"), Step("hangup", "A")),
}
SLOW_SECONDS = 3.0  # sipgate waits 10; a caller hears the silence before that


class Asked(NamedTuple):
    """What a reply asks of sipgate, and what is wrong with it."""

    action: ET.Element | None
    on_answer: str
    on_hangup: str
    complaints: list[str]


def understand(status: int, content_type: str, body: bytes, seconds: float) -> Asked:
    """Read the reply to a newCall or dtmf as sipgate does, and say what it would ignore or misunderstand."""
    complaints = []
    if seconds > SLOW_SECONDS:
        complaints.append(f"the reply took {seconds:.1f} s: the caller hears nothing meanwhile; 3 s is the most that is bearable")
    if status != 200:
        return Asked(None, "", "", [*complaints, f"the status is {status}: sipgate takes 200 only, and lets the call go on"])
    if content_type.partition(";")[0].strip().lower() != "application/xml":
        complaints.append(f"the Content-Type is {content_type or 'missing'}: expected application/xml")
    try:
        response = ET.fromstring(body)
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter two: of an encoding it names
        return Asked(None, "", "", [*complaints, f"the reply is no XML ({error}): sipgate lets the call go on"])
    if response.tag != "Response":
        return Asked(None, "", "", [*complaints, f"the root is <{response.tag}>: expected <Response>"])
    for name in ("onAnswer", "onHangup"):
        complaints += _url_complaints(name, response.get(name, "http://x/"))
    for action in response:
        complaints += _action_complaints(action)
    if len(response) > 1:
        complaints.append(f"{len(response)} actions in one <Response>: sipgate documents one")
    return Asked(response[0] if len(response) else None, response.get("onAnswer", ""), response.get("onHangup", ""), complaints)


def _url_complaints(name: str, url: str) -> list[str]:
    return [] if _place(url) else [f"{name} is {url!r}: expected a whole URL with http(s)://"]


def _place(url: str) -> tuple[str, int] | None:
    """Host and port of a URL that sipgate could follow, None for any other."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        parts.netloc.encode("idna")
    except ValueError:
        return None
    return (parts.hostname, port) if re.fullmatch(r"https?://[!-~]+", url) and parts.hostname else None


def _action_complaints(action: ET.Element) -> list[str]:
    known = {"Dial": ("Number", "Voicemail"), "Play": ("Url",), "Gather": ("Play",), "Reject": (), "Hangup": ()}
    if action.tag not in known:
        return [f"<{action.tag}> is no action of sipgate's: it is ignored"]
    complaints = [f"<{child.tag}> does not belong into <{action.tag}>: it is ignored"
                  for child in action if child.tag not in known[action.tag]]
    if action.tag == "Dial":
        numbers = action.findall("Number")
        if len(numbers) > 5 or (not numbers and action.find("Voicemail") is None):
            complaints.append(f"<Dial> has {len(numbers)} numbers: expected 1 to 5, or <Voicemail/>")
        complaints += [f"<Number> is {number.text!r}: expected digits without +" for number in numbers
                       if not re.fullmatch("[0-9]+", (number.text or "").strip())]
    if action.tag == "Reject" and action.get("reason", "rejected") not in ("rejected", "busy"):
        complaints.append(f"reason is {action.get('reason')!r}: expected rejected or busy")
    for url in action.iter("Url"):
        complaints += _url_complaints("<Url>", url.text or "")
    if action.tag == "Play" and action.find("Url") is None:
        complaints.append("<Play> has no <Url>: nothing is played")
    if action.tag == "Gather":
        complaints += _gather_complaints(action)
    return complaints


def _gather_complaints(gather: ET.Element) -> list[str]:
    complaints = _url_complaints("onData", gather.get("onData", "")) if "onData" in gather.attrib else [
        "<Gather> has no onData: the digits go nowhere"]
    for name in ("maxDigits", "timeout"):
        value = gather.get(name, "1000")
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
            complaints.append(f"{name} is {value[:40]!r}: expected a whole number of 1 or more")
        elif name == "timeout" and int(value) < 100:
            complaints.append(f"timeout is {value}: it counts in milliseconds; is {int(value) * 1000} meant?")
    return complaints


def described(action: ET.Element | None) -> str:
    """An action in a few words."""
    if action is None:
        return "no action"
    words = [action.tag, *(number.text or "" for number in action.findall("Number")), *(url.text or "" for url in action.iter("Url"))]
    if action.find("Voicemail") is not None:
        words.append("voicemail")
    if action.tag == "Gather":
        words.append(f"up to {action.get('maxDigits', '1')} digits")
    return printable(" ".join(words + [action.get("reason", "")]).strip())


class ThrowAwayKey:
    """An RSA key for one rehearsal, known to its receiver alone. 1024 bits are enough for a few seconds."""

    def __init__(self) -> None:
        p, q = self._prime(), self._prime()
        self.public = PublicKey(p * q, 65537)
        self._secret = pow(65537, -1, (p - 1) * (q - 1))

    @staticmethod
    def _prime() -> int:
        while True:
            number = int.from_bytes(os.urandom(64), "big") | 3 << 510 | 1
            if number % 65537 != 1 and all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7)):
                return number

    def sign(self, body: bytes) -> str:
        """The X-Sipgate-Signature of `body` (RFC 8017 8.2.1)."""
        digest = SHA256_PREFIX + hashlib.sha256(body).digest()
        block = b"\x00\x01" + b"\xff" * (self.public.size - len(digest) - 3) + b"\x00" + digest
        number = pow(int.from_bytes(block, "big"), self._secret, self.public.modulus)
        return base64.b64encode(number.to_bytes(self.public.size, "big")).decode()


class Sipgate:
    """Plays sipgate towards one server, and tells `say` what is said."""

    def __init__(self, url: str, options: argparse.Namespace, say: Callable[[str], None], key: ThrowAwayKey | None = None,
                 alias: str = "") -> None:
        """`url`: of the newCall; `alias`: a URL whose host stands for that of `url`; `key`: to sign with."""
        self.url, self.options, self.say, self.key, self.alias = urllib.parse.urlsplit(url), options, say, key, alias
        self.digits = options.digits.split(",")
        self.complaints = 0
        run = os.urandom(32).hex().upper()
        self.call_ids = {leg: run[:-1] + leg for leg in "AB"}
        self.xcid = os.urandom(8).hex()

    def play(self, steps: Sequence[Step]) -> None:
        """Play a scenario, and do what the replies say."""
        legs: dict[str, tuple[Asked, str, dict[str, Any]]] = {}  # what was asked, why it is over, who answers instead
        for step in steps:
            if step.leg == "B" and legs["A"][1]:
                continue  # a call that was refused is neither forwarded nor transferred
            if step.event == "newCall":
                asked = self._converse(self.url.geturl(), step.leg, self._fields(step))
                legs[step.leg] = (asked, *self._course(asked))
                continue
            asked, over, by = legs[step.leg]
            if step.event == "hangup" and asked.on_hangup:
                self._post_follow_up(asked.on_hangup, step, {"cause": over} if over else {})
            elif step.event == "answer" and asked.on_answer and not over:
                self._post_follow_up(asked.on_answer, step, by)

    def _course(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Why the call is over at once ("" if it is not), and who answers it instead."""
        action = asked.action
        if action is None or action.tag == "Play":
            return "", {}
        if action.tag == "Reject":
            return "busy" if action.get("reason") == "busy" else "noAnswer", {}
        if action.tag == "Hangup":
            return "normalClearing", {}
        if action.find("Voicemail") is not None:
            return "", {"user": "voicemail", "userId": "", "fullUserId": ""}
        numbers = [number.text or "" for number in action.findall("Number")]
        return "", {"user": "", "userId": "", "fullUserId": "", "answeringNumber": numbers[0]} if numbers else {}

    def _fields(self, step: Step) -> dict[str, Any]:
        options, users = self.options, self.options.user or ["Alice", "Bob"]
        fields: dict[str, Any] = {"event": step.event, "direction": "in", "from": options.sender, "to": options.to,
                                  "callId": self.call_ids[step.leg], "origCallId": self.call_ids["A"], "xcid": self.xcid}
        if step.event == "newCall":
            fields.update({"user[]": users, "userId[]": [f"w{n}" for n in range(len(users))],
                           "fullUserId[]": [f"1234567w{n}" for n in range(len(users))]})
        elif step.event == "answer":
            fields.update({"user": users[0], "userId": "w0", "fullUserId": "1234567w0", "answeringNumber": options.to})
        else:
            fields["cause"] = "normalClearing"
        if step.leg == "B":
            fields["diversion"] = options.to
        fields.update(step.fields)
        if fields["direction"] == "out":
            fields.update({"from": options.to, "to": options.sender})
        return fields

    def _post_follow_up(self, url: str, step: Step, changed: Mapping[str, Any]) -> None:
        fields = {**self._fields(step), **changed}
        status, _, _, _ = self._post(url, fields, fields["cause"] if step.event == "hangup" else
                                     fields["user"] or fields.get("answeringNumber", ""))
        if status not in (200, 0):
            self._complain(f"the status is {status}: expected 200")

    def _converse(self, url: str, leg: str, fields: Mapping[str, Any]) -> Asked:
        """Send a newCall, follow each Gather with digits; return what the last reply asked for."""
        users = f" ({', '.join(fields.get('user[]', []))})" if fields.get("user[]") else ""
        asked = self._ask(url, fields, f"{fields['from']} to {fields['to']}{users}")
        on_answer, on_hangup = asked.on_answer, asked.on_hangup
        for _ in range(20):
            if asked.action is None or asked.action.tag != "Gather" or not asked.action.get("onData"):
                break
            digits = self.digits.pop(0) if self.digits else ""
            fields = {"event": "dtmf", "dtmf": digits, "callId": self.call_ids[leg]}
            asked = self._ask(asked.action.get("onData", ""), fields, digits or "(no key pressed)")
            on_answer, on_hangup = asked.on_answer or on_answer, asked.on_hangup or on_hangup
        else:
            self._complain("20 times <Gather> in a row: the menu never ends")
        return asked._replace(on_answer=on_answer, on_hangup=on_hangup)

    def _ask(self, url: str, fields: Mapping[str, Any], words: str) -> Asked:
        status, content_type, body, seconds = self._post(url, fields, words, quiet=True)
        if not status:
            return Asked(None, "", "", [])
        asked = understand(status, content_type, body, seconds)
        paths = [urllib.parse.urlsplit(follow).path for follow in (asked.on_answer, asked.on_hangup) if _place(follow)]
        self.say(f"<-- {status} in {seconds * 1000:.0f} ms  {described(asked.action)}"
                 + (f", follow-ups to {printable(' and '.join(paths))}" if paths else ", no follow-ups"))
        for complaint in asked.complaints:
            self._complain(complaint)
        if status == 403:
            self.say("    (403: that server checks signatures, and a rehearsal against --url is not signed by sipgate)")
        return asked

    def _is_ours(self, url: str) -> bool:
        """Whether `url` is on the host that is rehearsed with; in a rehearsal of our own, WEBHOOK_URL stands for it."""
        return _place(url) in (_place(self.url.geturl()), _place(self.alias))

    def _complain(self, text: str) -> None:
        self.complaints += 1
        self.say(f"!!! {printable(text)}")

    def _post(self, url: str, fields: Mapping[str, Any], words: str, quiet: bool = False) -> tuple[int, str, bytes, float]:
        """POST an event as sipgate does; return status (0: nothing came), Content-Type, body and seconds."""
        time.sleep(self.options.pause)
        self.say(f"--> {fields['event']:8} {printable(words)}")
        if not _place(url):
            return 0, "", b"", 0.0  # which has been complained of
        if not self._is_ours(url):
            self._complain(f"{url} is on another host: it is not followed")
            return 0, "", b"", 0.0
        target = urllib.parse.urlsplit(url)
        body = urllib.parse.urlencode(fields, doseq=True, errors="replace").encode()
        headers = {"Accept": "application/xml, text/plain, text/html", "Accept-Charset": "utf-8", "User-Agent": "sipgate.io",
                   "X-SIPGATE-JOBS": "http://www.sipgate.de/jobs",
                   "Content-Type": "application/x-www-form-urlencoded; charset=UTF-8", "Accept-Encoding": "identity"}
        if self.key:
            headers["X-Sipgate-Signature"] = self.key.sign(body)
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        began = time.monotonic()
        try:
            with contextlib.closing(kind(self.url.netloc, timeout=10)) as connection:
                connection.request("POST", (target.path or "/") + (f"?{target.query}" if target.query else ""), body, headers)
                reply = connection.getresponse()
                content, seconds = reply.read(1_000_000), time.monotonic() - began
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._complain(f"no reply: {error or type(error).__name__}")
            return 0, "", b"", 0.0
        if not quiet:
            self.say(f"<-- {reply.status} in {seconds * 1000:.0f} ms")
        return reply.status, reply.headers.get("Content-Type", ""), content, seconds


def check_sound(path: str) -> str:
    """What keeps sipgate from playing the file, "" if nothing does. Raises SettingsError if it cannot be read."""
    import wave
    try:
        with wave.open(path, "rb") as sound:
            found = (sound.getnchannels(), sound.getsampwidth() * 8, sound.getframerate())
    except (wave.Error, EOFError) as error:
        return f"it is no PCM WAV file ({error or 'it is cut off'})"
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    return "" if found == (1, 16, 8000) else "it has {} channels, {} bit, {} Hz".format(*found)


def simulate(options: argparse.Namespace, settings: Settings) -> int:
    """The command `simulate`."""
    if options.sound:
        fault = check_sound(options.sound)
        print(f"{options.sound}: " + (f"sipgate skips it: {fault}; expected mono, 16 bit, 8000 Hz" if fault else "sipgate plays it"))
        return 1 if fault else 0
    names = list(SCENARIOS) if options.all else [options.scenario]
    if options.target:
        if _url_complaints("--url", options.target):
            raise SettingsError(_url_complaints("--url", options.target)[0])
        return min(1, sum(_rehearse(name, Sipgate(options.target, options, print)) for name in names))
    print("Rehearsal: nothing leaves this machine, but your functions really run"
          + (f" ({settings.call_handlers})" if settings.call_handlers else "") + ".")
    functions, key = load_functions(settings.call_handlers), ThrowAwayKey()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_the_end:
        server = at_the_end.enter_context(WebhookServer("127.0.0.1", 0, settings.base_path))
        log = CallLog(os.path.join(folder, "calls.db"), 1, extension=CALLS)
        at_the_end.callback(log.close, 5)
        server.receiver = Receiver(replace(settings, webhook_port=server.server_port), [key.public], functions, call_log=log)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        at_the_end.callback(server.stop, 1)
        errors = _ErrorCount()
        logger.addHandler(errors)
        at_the_end.callback(logger.removeHandler, errors)
        faults = 0
        for name in names:
            player = Sipgate(f"http://127.0.0.1:{server.server_port}{settings.base_path}/new-call", options, print, key,
                             server.receiver.settings.base_url)
            faults += _rehearse(name, player)
            if server.receiver.follow_ups.finish(10):
                faults += 1
                print("!!! your on_answer or on_hangup has not returned after 10 s; the rehearsal does not wait for it")
            call = log.call(player.call_ids["A"])
            print("\n".join(table([call], shutil.get_terminal_size().columns)) if call else "no call was stored")
    return 1 if faults or errors.count else 0


class _ErrorCount(logging.Handler):
    """Counts what is reported of your code."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.levelno >= logging.ERROR


def _rehearse(name: str, player: Sipgate) -> int:
    player.say(f"\n{name}")
    player.play(SCENARIOS[name])
    return player.complaints


# ------------------------------------------------------------------------------------------
# Check
# The command `check`: all that stands between a call and its line on the screen, one line each.
# It runs nothing of yours and creates no file. A finding is a pair: "ok", "warning" or
# "problem", and a sentence.
# ------------------------------------------------------------------------------------------

# Signed by sipgate, from the tests of its Node SDK (MIT). It is no event: its callId is empty.
VECTOR_BODY = (b"callId=&direction=in&event=newCall&from=4912354678&fullUserId%5B%5D%5B0%5D=123456789&originalCallId="
               b"&to=49999999&user%5B%5D%5B0%5D=TestUser&userId%5B%5D%5B0%5D=123456789&xcid=")
VECTOR_SIGNATURE = (
    "hlY7r9Vad0NP/7xJxf+vcDqjWaGWHOcIrj+rcP5aqQQcHtbSLsElp2kRNRPBL5unWbq6bExVPZB49HHM+Y/fWSVL19q7KSJhYPHfikcME0r0mCYB"
    "4S/VnJwnIvpiqz6s7Dpnk3wDCy65B3WQLwBVWA9oh6ojNM/g+87YnoMTKRx1KoFqosKNfBp1c1I8XjXusGOW/VlGnMb6wHhUVdwi9K7FfUgxj2pn"
    "V+M1Xv9rYs6RAi4V1OcUPqdT5geHsxWa09sk+AEHSUm1EFnAvx7PhIkugpNwST7yPKHf0+iyei4qUQCBZtfQVOI4mLZTRfQuyVo3YuJfvHaNPYY3"
    "4/1ZCZGCKeu+HS6WHs1vGUyKxSi8v4JJqog2VOlWruf8pMGg+syuAFwuxiCnWsSXgaaUfe9JrBAFjBxUmNP9DzR1bbkwxkJnthacu7jALXjGsubj"
    "SSSl955QgenV/ZpODHgWDPg0fe6qGILtk+kXLjyfSsoR/qgzE5W5OAyZq8W64h01KAt9Q283N7/2nogy6keiIWL3qjPolWnrchSP7iJUatM2YiTc"
    "pkNKnJ70UE05cdw3swuNe7zqD51MdOX3rAioEOFgOIFMSrxMVX+V4XK7sa5o43smN8lHoa+0AogQMuIrC7k2axdRbulSSNfyqVAZIT4qS0cItiv3"
    "aPXsdDKkkA0=")
LITTLE_ROOM = 100 * 1024 * 1024  # bytes


class Health(NamedTuple):
    """What GET /healthz of some address gave: a status, and the instance id if it was a copy of this script."""

    status: int
    instance: str
    refused: str


def get_health(url: str, seconds: float = 5.0) -> Health:
    """GET `url`/healthz. Raises OSError, http.client.HTTPException."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(kind(parts.netloc, timeout=seconds)) as connection:
        connection.request("GET", parts.path + "/healthz")
        reply = connection.getresponse()
        reply.read(1000)
    return Health(reply.status, reply.headers.get("X-Instance", ""), reply.headers.get("X-Refused", "0"))


def check_basics(settings: Settings) -> Iterator[tuple[str, str]]:
    """Versions, signature arithmetic, and the files that the settings name."""
    yield "ok", f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    is_right = is_signed(VECTOR_BODY, VECTOR_SIGNATURE, [PublicKey.from_pem(SIPGATE_PUBLIC_KEY)])
    yield ("ok", "signatures: sipgate's own example is verified") if is_right else (
        "problem", "signatures: sipgate's own example is not verified: get a fresh copy of this script")
    for warning in settings.warnings():
        yield "warning", warning
    try:
        load_keys(settings.signature_key_file)
        if settings.webhook_tls_cert:
            TlsFiles(settings.webhook_tls_cert, settings.webhook_tls_key)
    except SettingsError as error:
        yield "problem", str(error)
    if settings.call_handlers:
        try:
            compile(pathlib.Path(settings.call_handlers).read_bytes(), settings.call_handlers, "exec")
            yield "ok", f"your code: {settings.call_handlers} compiles"
        except (OSError, SyntaxError, ValueError) as error:
            yield "problem", f'CALL_HANDLERS is "{settings.call_handlers}": {error}'


def check_log(path: str) -> Iterator[tuple[str, str]]:
    """The call log: whether it can be written, is healthy, private, and has room; and what it tells."""
    if path == "off":
        yield "ok", "call log: off, nothing is kept"
        return
    folder, exists = os.path.dirname(path), os.path.lexists(path)
    if (exists and not os.path.isfile(path)) or not os.path.isdir(folder):
        yield "problem", f"call log: {path} is no file, or its folder does not exist: set CALL_LOG to a file, or to off"
        return
    # SQLite keeps files beside it, so the folder counts as well.
    if not os.access(folder, os.W_OK | os.X_OK) or (exists and not os.access(path, os.R_OK | os.W_OK)):
        yield "problem", f"call log: {path} or its folder cannot be written by this user: set CALL_LOG to a file that can, or to off"
        return
    if shutil.disk_usage(folder).free < LITTLE_ROOM:
        yield "warning", f"call log: less than {LITTLE_ROOM // 1024 // 1024} MB are free for {path}"
    if not os.path.exists(path) or not os.path.getsize(path):
        yield "ok", f"call log: {path} will be created"
        return
    if os.name != "nt" and os.stat(path).st_mode & 0o077:
        yield "warning", f"call log: {path} can be read by others: chmod 600 {path}"
    try:
        with contextlib.closing(open_calls(path)) as connection:
            fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise sqlite3.DatabaseError(fault)
            yield "ok", f"call log: {path} is healthy"
            yield from check_story(connection, time.time())
    except (SettingsError, sqlite3.Error) as error:
        is_damage = re.search("malformed|not a database|image", str(error)) or type(error) is sqlite3.DatabaseError
        yield "problem", f"call log: {error}" + (": the server puts a damaged file aside and begins a new one" if is_damage else "")


def check_story(connection: sqlite3.Connection, now: float) -> Iterator[tuple[str, str]]:
    """What the stored events tell of the way that they took."""
    last = connection.execute("SELECT received_at FROM events ORDER BY id DESC LIMIT 1").fetchone()
    if not last:
        yield "warning", "events: none yet; enter the URL in sipgate's console, choose the sources, and call"
        return
    yield "ok", f"events: the last one came {duration(max(now - last[0], 0))} ago"
    recent = dict(connection.execute("SELECT event, count(*) FROM (SELECT event FROM events ORDER BY id DESC LIMIT 1000) GROUP BY event"))
    if recent.get("newCall", 0) >= FOLLOW_UPS_MISSED and not recent.get("answer") and not recent.get("hangup"):
        yield "problem", ("follow-ups do not arrive: there are newCalls, but never an answer or a hangup; the URLs in the "
                          "replies begin with WEBHOOK_URL, which must be reached from the internet")


def check_port(settings: Settings) -> tuple[tuple[str, str], str]:
    """Whether the port is free or held, and the instance id if it is held by a copy of this script."""
    scheme = "https" if settings.webhook_tls_cert else "http"
    host = "127.0.0.1" if settings.webhook_host in ("0.0.0.0", "::", "localhost") else settings.webhook_host
    place = f"port {settings.webhook_port} of {host}"
    try:
        with socket.create_connection((host, settings.webhook_port), 5):
            pass
    except OSError:
        try:
            with WebhookServer(settings.webhook_host, settings.webhook_port):
                return ("ok", f"{place} is free"), ""
        except (OSError, UnicodeError) as error:
            return ("problem", bind_advice(error, settings)), ""
    try:
        kind = ssl._create_unverified_context() if scheme == "https" else None  # our own, on this machine
        connection = (http.client.HTTPSConnection(host, settings.webhook_port, timeout=5, context=kind) if kind else
                      http.client.HTTPConnection(host, settings.webhook_port, timeout=5))
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            reply = connection.getresponse()
            said = reply.read(1000).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return ("problem", f"{place} is held by another program: stop it, or choose another port"), ""
    instance, refused = reply.headers.get("X-Instance", ""), reply.headers.get("X-Refused", "0")
    if reply.status == 503 and (instance or said == "stopping"):
        return ("problem", f"{place}: the running copy says: {printable(said)}"), instance
    if not instance:
        return ("problem", f"{place} is held by another program: stop it, or choose another port"), ""
    if refused != "0":
        return ("warning", f"{place} is held by a running copy, which has refused {printable(refused)} webhooks: its stderr says why"), instance
    return ("ok", f"{place} is held by a running copy of this script"), instance


def check_way_in(settings: Settings, instance: str) -> tuple[str, str]:
    """Whether WEBHOOK_URL leads, through the internet, to the process with this instance id."""
    url = settings.webhook_url
    try:
        health = get_health(url)
    except ssl.SSLCertVerificationError as error:
        return "problem", f"{url}: sipgate will not accept the certificate: {error.verify_message}; get one from Let's Encrypt, for instance"
    except ssl.SSLError as error:
        return "problem", f"{url} does not speak https there: {error.reason or error}"
    except socket.timeout:  # noqa: UP041 - no TimeoutError before Python 3.10
        return "warning", f"{url} does not answer in time; from inside, that may be a router that cannot reach its own public address"
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        return "problem", f"{url} cannot be reached ({error or type(error).__name__}): is the tunnel or proxy running?"
    if instance and health.instance == instance:
        return "ok", f"{url} leads to this script"
    if health.instance:
        return "problem", f"{url} leads to another copy of this script: check the port that the tunnel or proxy leads to"
    parts = urllib.parse.urlsplit(url)
    with contextlib.suppress(OSError, UnicodeError, http.client.HTTPException):
        if instance and parts.path and get_health(f"{parts.scheme}://{parts.netloc}").instance == instance:
            return "problem", (f"{url}: the path {parts.path} does not get through: let the proxy pass it on, or take it out of "
                               "WEBHOOK_URL, if the running copy has the same one")
    if health.status == 404:
        return "problem", f"{url}/healthz is not found there (404): the path or the address is another one"
    return "problem", f"{url} leads to another server (status {health.status}): check where the tunnel or proxy leads"


def check_network(settings: Settings) -> Iterator[tuple[str, str]]:
    """The port, and the way to it; if nobody listens, this listens itself for a moment."""
    finding, instance = check_port(settings)
    yield finding
    if settings.trial:
        yield "warning", "no WEBHOOK_URL: trial mode, sipgate cannot reach this machine"
    elif instance or finding[0] == "problem":
        yield check_way_in(settings, instance)
    else:
        try:
            tls = TlsFiles(settings.webhook_tls_cert, settings.webhook_tls_key) if settings.webhook_tls_cert else None
        except SettingsError:
            return  # said already, with the files
        with WebhookServer(settings.webhook_host, settings.webhook_port, settings.base_path, tls) as server:
            server.receiver = Receiver(settings, [], CallFunctions())
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield check_way_in(settings, server.instance)
            server.stop(1)


def check(options: argparse.Namespace, settings: Settings) -> int:
    """The command `check`."""
    findings: list[Iterator[tuple[str, str]]] = [check_basics(settings), check_log(settings.call_log), check_network(settings)]
    worst = 0
    for kind, text in itertools.chain.from_iterable(findings):
        print(f"{kind:8} {text}")
        worst |= kind == "problem"
    return worst


# ------------------------------------------------------------------------------------------
# Command line
# The only place that reads files, the environment and arguments.
# ------------------------------------------------------------------------------------------

@contextlib.contextmanager
def consoles() -> Iterator[None]:
    """Lead sys.stdout and sys.stderr through Consoles."""
    real = sys.stdout, sys.stderr
    # pythonw has no streams at all.
    out, err = (Console(stream or open(os.devnull, "w", encoding="utf-8")) for stream in real)  # noqa: SIM115
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.drain(0.2)
        err.drain(0.2)
        sys.stdout, sys.stderr = real


@contextlib.contextmanager
def diagnostics() -> Iterator[None]:
    """Lead our messages to sys.stderr."""
    handler = logging.StreamHandler(sys.stderr)
    # journald writes the time itself.
    moment = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    handler.setFormatter(DiagnosticFormatter(moment + "%(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)


def read_env_file(path: str) -> str:
    """Return the text of a .env file. Raises SettingsError."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
        raise SettingsError(f"{path} is in UTF-16, as PowerShell's > writes it: save it as UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not in UTF-8, see line {content.count(10, 0, error.start) + 1}: "
                            "save it as UTF-8") from None


def read_settings(options: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Return the settings: a flag counts before the environment, that before .env. Raises SettingsError."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".env")
    found = [path for path in (beside, os.path.abspath(".env")) if os.path.isfile(path)]
    path = os.path.abspath(options.env_file) if options.env_file else found[0] if found else ""
    text = read_env_file(path) if path else ""
    if path:
        print(f"Settings are read from {path}", file=sys.stderr)
    values = {**parse_dotenv(text, environ), **environ}
    flags = {"WEBHOOK_URL": options.url, "WEBHOOK_PORT": options.port}
    values.update((name, value) for name, value in flags.items() if value is not None)
    known = [setting.name.upper() for setting in fields(Settings)]
    for name in known:
        if environ.get(name) == "" and re.search(rf"(?m)^\s*(export\s+)?{name}\s*=\s*\S", text):
            logger.warning("%s is empty in the environment, which switches off the one in .env", name)
    for name in sorted(set(values) - set(known)):
        close = likely(name.upper(), known)
        if close or re.match("(WEBHOOK|CALL)_", name):
            logger.warning("there is no setting %s%s", name, f"; is {close} meant?" if close else "")
    return Settings.from_values(values, os.path.dirname(path))


def some_seconds(text: str) -> float:
    """For argparse: 0 to 60 seconds."""
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", text) or float(text) > 60:
        raise argparse.ArgumentTypeError(f'"{text}": expected 0 to 60 seconds')
    return float(text)


def whole_number(text: str) -> int:
    """For argparse: a count of 1 or more."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}": expected a whole number of 1 or more')
    return int(text)


def command_line() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog=os.path.basename(__file__), allow_abbrev=False,
        description="Receive the call events of sipgate.io. Without a command: serve.",
        epilog="Further settings, in the environment or in a .env file: "
        + ", ".join(known.name.upper() for known in fields(Settings)[2:]) + ". See the README.")
    parser.add_argument("--url", metavar="URL", help="public base URL of the webhooks (WEBHOOK_URL)")
    parser.add_argument("--port", metavar="PORT", help="port to listen on (WEBHOOK_PORT, default 8080)")
    parser.add_argument("--env-file", metavar="FILE", help="read this file instead of .env")
    parser.add_argument("--version", action="version", version=f"sipgate_callevents {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    calls = commands.add_parser("calls", help="show the latest calls", allow_abbrev=False, description="Show the latest calls, "
                                "newest last. Times in the table are local, in JSON and CSV UTC.", epilog="In CSV an apostrophe "
                                "stands before what a spreadsheet would take for a formula or a number to be rounded.")
    calls.add_argument("--missed", action="store_true", help="those to ring back: missed or on voicemail, not spoken to since")
    calls.add_argument("--since", metavar="DATE", help="from this day or moment on, such as 2026-11-01")
    calls.add_argument("--number", metavar="NUMBER", default="", help="from or to this number; * stands for any digits")
    calls.add_argument("--limit", metavar="N", type=whole_number, default=20, help="at most so many (20)")
    calls.add_argument("--events", action="store_true", help="with the events of each call (not in CSV)")
    calls.add_argument("--format", choices=("table", "csv", "json"), default="table")
    forget = commands.add_parser("forget", help="remove every trace of a number", allow_abbrev=False,
                                 description="Remove every trace of a number from the call log. The calls stay.")
    forget.add_argument("number", help="the whole number, such as 4915791234567")
    simulate = commands.add_parser("simulate", help="rehearse calls without a phone", allow_abbrev=False, description="Rehearse a "
                                   "call: play sipgate towards this script with your settings and your functions.")
    simulate.add_argument("scenario", nargs="?", choices=list(SCENARIOS), default="answered", metavar="SCENARIO",
                          help=f"{', '.join(SCENARIOS)} (default: answered)")
    simulate.add_argument("--all", action="store_true", help="every scenario in turn")
    simulate.add_argument("--from", dest="sender", metavar="NUMBER", default="492111234567", help="the caller")
    simulate.add_argument("--to", metavar="NUMBER", default="4915791234567", help="the number called")
    simulate.add_argument("--user", metavar="NAME", action="append", help="who rings (repeatable)")
    simulate.add_argument("--digits", metavar="1,0042", default="1", help="what the caller presses, menu by menu; empty: nothing")
    simulate.add_argument("--pause", metavar="SECONDS", type=some_seconds, default=0.05, help="between the events (0.05)")
    simulate.add_argument("--url", dest="target", metavar="URL", help="play against another server: its full newCall address")
    simulate.add_argument("--sound", metavar="FILE", help="only check whether sipgate would play this file")
    check = commands.add_parser("check", help="find out why nothing arrives", allow_abbrev=False,
                                description="Go through all that stands between a call and its line on the screen.")
    check.add_argument("--url", metavar="URL", default=argparse.SUPPRESS, help="as given to the server")
    check.add_argument("--port", metavar="PORT", default=argparse.SUPPRESS, help="as given to the server")
    for command in (calls, forget, simulate, check):
        command.add_argument("--env-file", metavar="FILE", default=argparse.SUPPRESS, help="read this file instead of .env")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(argv)
    # A file named in CALL_HANDLERS imports this very module, whatever the script is called.
    sys.modules["sipgate_callevents"] = sys.modules[__name__]
    commands = {"calls": show_calls, "forget": forget_number, "simulate": simulate, "check": check}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than end at a name that the terminal cannot show
    # A command may wait for whoever reads its output; a server may not.
    with contextlib.nullcontext() if options.command else consoles(), diagnostics():
        try:
            settings = read_settings(options, os.environ)
            status = commands[options.command](options, settings) if options.command else serve(settings, CALLS)
            sys.stdout.flush()
            return status
        except OSError as error:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - nothing is left to flush
            if isinstance(error, BrokenPipeError):  # such as head, which has seen enough
                return 0
            print(f"sipgate_callevents: {error}", file=sys.stderr)
            return 1
        except sqlite3.Error as error:
            print(f"sipgate_callevents: {settings.call_log} cannot be read: {error}", file=sys.stderr)
            return 1
        except Nothing as nothing:
            print(f"{str(nothing)[0].upper()}{str(nothing)[1:]}.", file=sys.stderr)
            return 0
        except SettingsError as error:
            for problem in error.problems:
                if options.command == "check":
                    print(f"problem  {problem}")
                else:
                    print(f"sipgate_callevents: {problem}", file=sys.stderr)
            return 1 if options.command == "check" else 2


if __name__ == "__main__":
    sys.exit(main())
