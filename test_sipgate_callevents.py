"""Tests of sipgate_callevents.py: python3 -m unittest

In the order of its sections. Plain functions are called; what only exists on a connection
(status codes, headers, limits) is tried over loopback, and whole programs are started where
start and stop matter. Nothing is mocked, no port is fixed.
"""
import argparse
import base64
import datetime
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import os
import py_compile
import random
import re
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse
import wave
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Barrier, Event, Thread
from unittest import TestCase

import sipgate_callevents as sc
from sipgate_callevents import (
    AnswerEvent, CallFunctions, CallLog, DtmfEvent, HangupEvent, NewCallEvent, Receiver,
    Settings, SettingsError, WebhookError, WebhookServer,
    dial, gather, hang_up, is_signed, parse_event, play, reject, response_xml, voicemail,
)

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "sipgate_callevents.py")  # what programs run: compiled once

# The examples of sipgate's documentation, as its curl commands send them.
NEW_CALL = (b"event=newCall&from=492111234567&to=4915791234567&direction=in&callId=123456"
            b"&user[]=Alice&user[]=Bob&userId[]=w0&userId[]=w1"
            b"&fullUserId[]=1234567w0&fullUserId[]=1234567w1")
ANSWER = (b"event=answer&callId=123456&user=John+Doe&userId=w0&fullUserId=1234567w0"
          b"&from=492111234567&to=4915791234567&direction=in&answeringNumber=21199999999")
HANGUP = (b"event=hangup&cause=normalClearing&callId=123456&from=492111234567&to=4915791234567"
          b"&direction=in&answeringNumber=4921199999999")
DTMF = b"event=dtmf&dtmf=1&callId=123456"
FOLLOW_UPS = (("/on-answer", ANSWER), ("/on-data", DTMF), ("/on-hangup", HANGUP))

# Signed by sipgate, from the tests of its Node SDK (MIT). It is no event: its callId is empty.
VECTOR_BODY = (
    b"callId=&direction=in&event=newCall&from=4912354678&fullUserId%5B%5D%5B0%5D=123456789"
    b"&originalCallId=&to=49999999&user%5B%5D%5B0%5D=TestUser&userId%5B%5D%5B0%5D=123456789&xcid=")
VECTOR_SIGNATURE = """
hlY7r9Vad0NP/7xJxf+vcDqjWaGWHOcIrj+rcP5aqQQcHtbSLsElp2kRNRPBL5unWbq6bExVPZB49HHM+Y/fWSVL
19q7KSJhYPHfikcME0r0mCYB4S/VnJwnIvpiqz6s7Dpnk3wDCy65B3WQLwBVWA9oh6ojNM/g+87YnoMTKRx1KoFq
osKNfBp1c1I8XjXusGOW/VlGnMb6wHhUVdwi9K7FfUgxj2pnV+M1Xv9rYs6RAi4V1OcUPqdT5geHsxWa09sk+AEH
SUm1EFnAvx7PhIkugpNwST7yPKHf0+iyei4qUQCBZtfQVOI4mLZTRfQuyVo3YuJfvHaNPYY34/1ZCZGCKeu+HS6W
Hs1vGUyKxSi8v4JJqog2VOlWruf8pMGg+syuAFwuxiCnWsSXgaaUfe9JrBAFjBxUmNP9DzR1bbkwxkJnthacu7jA
LXjGsubjSSSl955QgenV/ZpODHgWDPg0fe6qGILtk+kXLjyfSsoR/qgzE5W5OAyZq8W64h01KAt9Q283N7/2nogy
6keiIWL3qjPolWnrchSP7iJUatM2YiTcpkNKnJ70UE05cdw3swuNe7zqD51MdOX3rAioEOFgOIFMSrxMVX+V4XK7
sa5o43smN8lHoa+0AogQMuIrC7k2axdRbulSSNfyqVAZIT4qS0cItiv3aPXsdDKkkA0=""".replace("\n", "")

# A key made for these tests alone: everybody may know its primes.
PRIMES = (3 << 1022) + 1037, (3 << 1022) + 1697
TEST_KEY = sc.PublicKey(PRIMES[0] * PRIMES[1], 65537)
TEST_KEY_SECRET = pow(65537, -1, (PRIMES[0] - 1) * (PRIMES[1] - 1))
TEST_KEY_PEM = "-----BEGIN PUBLIC KEY-----\n{}-----END PUBLIC KEY-----\n".format(
    base64.encodebytes(
        bytes.fromhex("30820122300d06092a864886f70d01010105000382010f003082010a0282010100")
        + TEST_KEY.modulus.to_bytes(256, "big") + bytes.fromhex("0203010001")).decode())

# Certificates for localhost, each before its key, made for these tests alone: one for 100 years,
# one expired.
CERTIFICATES = ("""\
-----BEGIN CERTIFICATE-----
MIIBLjCB16ADAgECAgEGMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMMCWxvY2FsaG9z
dDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFDESMBAGA1UEAwwJ
bG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAERWtLvhF8YWh3pjPM
xwQOM/ET/j8SvPFjlgM4TW6m7vJW8JZe3utlGSmQljY4ojUfWNyNM/QwkFCbqcWw
V1EcAKMYMBYwFAYDVR0RBA0wC4IJbG9jYWxob3N0MAoGCCqGSM49BAMCA0YAMEMC
H0TIqA/hmTBgm3fUUqB+T8/p4LhSgXOzcklHHurpH28CIDWoVCbg2I4O6G9sQDUf
wTGUGhGc8y1BGD/PsA/5wrSu
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MEECAQAwEwYHKoZIzj0CAQYIKoZIzj0DAQcEJzAlAgEBBCBd0yWoxKuUrz9cGaNa
umYGyzwVI7yQSWpzzMJybxJVqw==
-----END PRIVATE KEY-----
""", """\
-----BEGIN CERTIFICATE-----
MIIBPjCB5qADAgECAgEHMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMMCWxvY2FsaG9z
dDAeFw0yMDAxMDEwMDAwMDBaFw0yMDAyMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxv
Y2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLsGubKxc/XHC248lt8Q
1CBbavjSObRUQdrMUpJoh/0Rhtv37zVtXl8jpLJooGYRC5nyqiFJX0CojloXRc2m
sWmjKTAnMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/MAoG
CCqGSM49BAMCA0cAMEQCIFSfW9ogmD7D/m8faWx4285EYm7lKEu6GAQOTZl9dlJR
AiBc/dOCA4seb4NDBwvQtTmh/cUGTcv8Hbkc/fYsmOWWew==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MEECAQAwEwYHKoZIzj0CAQYIKoZIzj0DAQcEJzAlAgEBBCCDNCMu/sYZQqfFlS98
8pTu8gW0yk9eCW1Zbf9gCezv3g==
-----END PRIVATE KEY-----
""")


@lru_cache(maxsize=None)
def sign(body):
    """The X-Sipgate-Signature of `body` by the test key (RFC 8017 8.2.1)."""
    digest = sc.SHA256_PREFIX + hashlib.sha256(body).digest()
    block = b"\x00\x01" + b"\xff" * (TEST_KEY.size - 3 - len(digest)) + b"\x00" + digest
    number = pow(int.from_bytes(block, "big"), TEST_KEY_SECRET, TEST_KEY.modulus)
    return base64.b64encode(number.to_bytes(TEST_KEY.size, "big")).decode()


@contextmanager
def diagnostics(expected=""):
    """The list that grows by each message of the script's logger; `expected` is in the first."""
    said, listener = [], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage() + getattr(record, "below", ""))
    sc.logger.addHandler(listener)
    try:
        yield said
    finally:
        sc.logger.removeHandler(listener)
    if expected not in "".join(said[:1]):
        raise AssertionError(f"{expected!r} is not what was said first: {said}")


def setUpModule():
    # What a test does not look for is not to appear between the dots.
    sc.logger.addHandler(logging.NullHandler())
    sc.Worker.IDLE_SECONDS = sc.CallLog.RETRY_SECONDS = 0.02
    for name in filter(re.compile("WEBHOOK|CALL|VERIFY|SIGNATURE|JOURNAL").match, list(os.environ)):
        del os.environ[name]
    os.environ["COLUMNS"] = "80"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # & ignores it
    global SCRIPT
    folder = tempfile.mkdtemp()
    unittest.addModuleCleanup(shutil.rmtree, folder)
    compiled = os.path.join(folder, "sipgate_callevents.pyc")
    SCRIPT = py_compile.compile(SCRIPT, compiled, doraise=True)
    if os.name != "nt":
        HangingTest.begin(folder)


def tearDownModule():
    """Nothing; but without it Python 3.8 leaves out the clean-ups of setUpModule."""


def temporary_folder(test):
    folder = os.path.realpath(tempfile.mkdtemp())
    test.addCleanup(shutil.rmtree, folder)
    return folder


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        Event().wait(0.005)


@contextmanager
def within(seconds):
    """Fail if what is done in it takes longer."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    if took >= seconds:
        raise AssertionError(f"it took {took:.2f} s, and not {seconds}")


def mutations(good, pieces, count):
    """So many variants of the text or bytes `good`, with up to four places overwritten."""
    chance = random.Random(good)
    for _ in range(count):
        parts = list(good)
        for _ in range(chance.randrange(1, 5)):
            parts[chance.randrange(len(parts))] = chance.choice(pieces)
        yield bytes(parts) if isinstance(good, bytes) else "".join(parts)


def change(test, owner, name, value):
    """Have an attribute so until the test is over."""
    test.addCleanup(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


on_posix = partial(unittest.skipIf, os.name == "nt")
on_linux = unittest.skipUnless(sys.platform == "linux", "prlimit")


def gate(test):
    """An Event to wait for, which is set at the latest when the test is over."""
    event = Event()
    test.addCleanup(event.set)
    return event


class WithFolder(TestCase):
    """Tests in a folder of their own."""

    def setUp(self):
        self.folder = temporary_folder(self)
        self.path = os.path.join(self.folder, "calls.db")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def write(self, name, text):
        path = Path(self.folder, name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    def store(self, rows):
        """Put rows into the call log, a new one if there is none."""
        CallLog(self.path, 30).close(5)
        with database_at(self.path) as database:
            fill(database, rows)


def new_log(test, path=""):
    log = CallLog(path or os.path.join(temporary_folder(test), "calls.db"), 30)
    test.addCleanup(log.close, 5)
    return log


def catch_up(log):
    wait_until(lambda: not log.behind)


def database_at(path):
    return closing(sqlite3.connect(path, isolation_level=None, timeout=10))


def stored(path, what="call_id"):
    """The rows of a call log, earliest first; of a single column, its values."""
    with database_at(path) as database:
        return [row if row[1:] else row[0]
                for row in database.execute(f"SELECT {what} FROM events ORDER BY id")]


def alter(path, script):
    with database_at(path) as database:
        database.executescript(script)


def damage(path):
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 9000)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return closed.getsockname()[1]


def http_to(port):
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10))


# ---- Settings ----

class DotenvTest(WithFolder):
    ROWS = (  # text, what it sets: as python-dotenv 1.2 reads it
        ("a=b", {"a": "b"}),
        (" a = b ", {"a": "b"}),
        ("export a=b", {"a": "b"}),
        ("export=1", {"export": "1"}),
        ("a=", {"a": ""}),
        ("a=b #c", {"a": "b"}),
        ("a=b#c", {"a": "b#c"}),
        ('a="b # c"', {"a": "b # c"}),
        ("a='b c '", {"a": "b c "}),
        ('a="b" # c', {"a": "b"}),
        ("a=it's", {"a": "it's"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=$b", {"a": "$b"}),
        ("a=1\na=2", {"a": "2"}),
        ("\n  \n# a=b\n", {}),
        ("a=1\rb=2\r\nc=3\nd=4", {"a": "1", "b": "2", "c": "3", "d": "4"}),
        ("\ufeffa=b", {"a": "b"}),
    )

    def read(self, text):
        return sc.read_env_file(self.write(".env", text))

    def test_known_lines_mean_what_python_dotenv_makes_of_them(self):
        for text, sets in self.ROWS:
            self.assertEqual(self.read(text), sets, text)

    def test_any_other_line_is_not_read_and_its_number_is_said(self):
        for line in ("a=${b}", 'a="b\\n"', "a='b\\'", 'a="b', "export a='b' c", 'a="b" c', 'a = "b',
                     "a= # b", "a=b\0", "a", "'a'=b", "a b=c", "=b", "a-b=c"):
            with self.subTest(line), diagnostics("line 2 cannot be read: expected NAME=value"):
                self.assertEqual(self.read(f"x=1\r\n{line}\ny=2"), {"x": "1", "y": "2"})

    def test_any_text_is_read_without_an_error(self):
        pieces = ["'", '"', "\\", "\n", "\r", " ", "#", "${a}", "=", "\0", "ä", ""]
        with diagnostics():
            for text in mutations('export a="b" # c\nd=e', pieces, 3000):
                self.assertIsInstance(self.read(text), dict, text)


class SettingsTest(TestCase):
    WRONG = (  # setting, values, what was expected
        ("WEBHOOK_HOST", ("0.0.0.0",), "127.0.0.1, or WEBHOOK_URL set as well"),
        ("WEBHOOK_PORT", ("80a", "65536", "²"), "a whole number from 0 to 65535"),
        ("VERIFY_SIGNATURE", ("yes",), "on, new-call or off"),
        ("CALL_LOG_DAYS", ("0",), "a whole number from 1 to 99999"),
        ("CALL_OUTPUT", ("xml",), "text, json or off"),
        ("CALL_PAGE_KEY", ("short", "ü" * 20), "16 to 128 letters and digits"),
        ("WEBHOOK_URL", (
            "https://example.org:99999", "https://example.org:0", "https://a:abc", "https://[::1",
            "example.org", "ftp://example.org", "https:///x", "https://me:pw@example.org",
            "https://[abc]/x", "https://example.org?a=b", "https://example.org/#a",
            "https://example.org/ä", "https://ADDRESS/x", "https://x.example/SECRET-PATH",
            "https://example.org/a/new-call", "https://example.org/on-hangup/"),
         "an address such as https://example.org/3f9c2a, without /new-call, query or user"),
    )

    def test_nothing_set_or_empty_is_trial_mode_on_this_machine(self):
        for values in ({}, {"WEBHOOK_PORT": "", "WEBHOOK_URL": " "}):
            settings = sc.checked(values)
            self.assertEqual((settings, settings.trial, settings.base_url),
                             (Settings(call_log=settings.call_log), True, "http://localhost:8080"))
        for host in ("127.0.0.2", "::1", "localhost"):
            self.assertTrue(sc.checked({"WEBHOOK_HOST": host}).trial)
        self.assertEqual(sc.checked({"CALL_LOG": "Off"}).call_log, "off")
        settings = sc.checked({"WEBHOOK_URL": "https://example.org/3f/"})  # the slash is mended
        self.assertEqual((settings.trial, settings.base_url), (False, "https://example.org/3f"))

    def test_wrong_values_are_named_with_what_was_expected(self):
        for name, values, expected in self.WRONG:
            for value in values:
                with self.assertRaises(SettingsError) as caught:
                    sc.checked({name: value})
                said = f'{name} is "{value}": expected {expected}'
                self.assertEqual(caught.exception.args, (said,))

    def test_what_is_probably_not_meant_is_said(self):
        for url, verify, said in [
                ("http://example.org/3f", "on", "newer accounts take https only"),
                ("https://example.org", "on", "WEBHOOK_URL=https://example.org/"),
                ("https://example.org/3f", "off", "anyone who knows the address"),
                ("", "on", ""), ("https://example.org/3f", "on", ""),
                ("http://localhost:8080", "on", "")]:
            warnings = list(sc.warnings_of(Settings(webhook_url=url, verify_signature=verify)))
            self.assertEqual([said in warning for warning in warnings], [True] * bool(said), url)


# ---- Signatures ----

class SignatureTest(WithFolder):
    KEYS = (sc.SIPGATE_KEY,)

    def test_the_key_is_the_one_that_sipgate_publishes(self):
        der = base64.b64decode("".join(sc.SIPGATE_PUBLIC_KEY.split("\n")[1:-2]))
        self.assertEqual(hashlib.sha256(der).hexdigest(),
                         "893cfd6caad92efc277a5977daec63dee1597223b1df5b2bf69ef56cd92305b3")
        path = self.write("key.pem", sc.SIPGATE_PUBLIC_KEY)
        self.assertEqual(sc.load_keys(path), [sc.SIPGATE_KEY])

    def test_what_sipgate_signed_is_signed_and_no_other_body(self):
        good = VECTOR_BODY
        self.assertTrue(is_signed(good, VECTOR_SIGNATURE, self.KEYS))
        for body in (good + b"\n", good.replace(b"=in", b"=io"), good.replace(b"%5B%5D", b"[]"),
                     good.replace(b"%5B%5D", b"%5b%5d"), b""):
            self.assertFalse(is_signed(body, VECTOR_SIGNATURE, self.KEYS), body)

    def test_another_spelling_of_the_signature_is_refused(self):
        good = VECTOR_SIGNATURE
        for label, signature in [
                ("cut", good[:-4]), ("no padding", good[:-1]), ("none", None), ("empty", ""),
                ("blank inside", good[:99] + " " + good[99:]),
                ("line feed inside", good[:76] + "\n" + good[76:]),
                ("line feed behind", good + "\n"), ("not canonical", good[:-2] + "1="),
                ("URL alphabet", good.replace("/", "_")), ("not ASCII", good[:-1] + "\xe4"),
                ("twice", good * 2)]:
            self.assertFalse(is_signed(VECTOR_BODY, signature, self.KEYS), label)

    def test_a_further_key_counts_but_no_signature_plus_its_modulus(self):
        body = b"1"
        total = int.from_bytes(base64.b64decode(sign(body)), "big") + TEST_KEY.modulus
        second = base64.b64encode(total.to_bytes(256, "big")).decode()
        for signature, keys, is_good in [
                (sign(body), [*self.KEYS, TEST_KEY, *self.KEYS], True),
                (sign(body), self.KEYS, False), (sign(body), [], False),
                (second, [TEST_KEY], False)]:
            self.assertIs(is_signed(body, signature, keys), is_good)

    def test_a_file_that_holds_no_key_of_this_kind_is_named(self):
        lines, ends = TEST_KEY_PEM.split("\n"), ("AQABAQ==", "AQA", "AQAD", "AQAB" + "AAAA" * 100)
        der = base64.b64decode("".join(lines[1:-2]))
        longer = base64.b64encode(der[:32] + b"\3" + der[33:]).decode()  # by two bits
        for text in ("", TEST_KEY_PEM.replace("PUBLIC", "PRIVATE"),
                     "\n".join(lines[:3] + lines[4:]), "\n".join([lines[0], longer, *lines[-2:]]),
                     *(TEST_KEY_PEM.replace("AQAB", end) for end in ends)):
            self.assertRaisesRegex(SettingsError, "expected a PEM file with an RSA key of",
                                   sc.load_keys, self.write("key.pem", text))

    def test_any_other_header_gives_false(self):
        pieces = ["", "A", "B", "=", "\n", "\xff", "\u20ac", "AA"]
        for header in mutations(VECTOR_SIGNATURE, pieces, 2000):
            if header != VECTOR_SIGNATURE:
                self.assertIs(is_signed(VECTOR_BODY, header, self.KEYS), False, header)


# ---- Call events ----

class EventTest(TestCase):
    LEG = {"call_id": "123456", "from_number": "492111234567", "to_number": "4915791234567",
           "direction": "in"}
    EVENTS = (  # body, event
        (NEW_CALL + b"&origCallId=123455&xcid=00ab&diversion=4921100000", NewCallEvent(
            **LEG, orig_call_id="123455", xcid="00ab", diversion="4921100000",
            users=("Alice", "Bob"), user_ids=("w0", "w1"),
            full_user_ids=("1234567w0", "1234567w1"))),
        (ANSWER, AnswerEvent(**LEG, user="John Doe", user_id="w0", full_user_id="1234567w0",
                             answering_number="21199999999")),
        (HANGUP, HangupEvent(**LEG, cause="normalClearing", answering_number="4921199999999")),
        (b"event=dtmf&dtmf=0042*%23&callId=1",
         DtmfEvent(call_id="1", dtmf="0042*#", state="language")),
        (b"event=transfer&callId=1&user=U", sc.CallEvent(call_id="1", event="transfer")),
        (b"", NewCallEvent()), (b"from=&callId=", NewCallEvent()),
    )

    def test_each_event_has_all_its_fields(self):
        for body, expected in self.EVENTS:
            event = parse_event(body, "newCall", "language")
            self.assertEqual(event, replace(expected, fields=event.fields))
            self.assertEqual((event.body, event.signature), (body, None))

    def test_lists_are_taken_in_each_spelling(self):
        for body, users in [
                (b"user[]=Al+ice", ("Al ice",)), (b"user%5B%5D=A", ("A",)),
                (b"user%5b%5d=A", ("A",)), (b"user%5B%5D%5B0%5D=A", ("A",)),
                (b"user%5B%5D=&callId=1", ()), (b"user[]=A&user[]=", ("A", "")),
                (b"user[]=J%C3%BCrgen", ("Jürgen",)), ("user[]=Jürgen".encode(), ("Jürgen",)),
                (b"user[]=J\xfcrgen", ("J\ufffdrgen",)),
                (b"userId[]=w&fullUserId[]=1w&user[]=U&" * 300, ("U",) * 300)]:
            self.assertEqual(parse_event(body, "newCall").users, users)

    def test_all_fields_are_kept_and_found_by_sipgate_s_names(self):
        event = parse_event(b"callId=1&mood=good&mood=bad&later=", "newCall")
        self.assertEqual(event.fields, {"callId": ["1"], "mood": ["good", "bad"], "later": [""]})
        for body in (b"event=pause&user=A&user=B", b"event=newCall&cause=A&cause=B"):
            self.assertEqual(len(parse_event(body, "").fields), 2, "it is no field of this event")
        self.assertEqual([event.get("callId"), event.get("mood"), event.get("none"),
                          event.get("none", "-")], ["1", "good", "", "-"])

    def test_the_call_is_looked_up_once_and_only_when_asked_for(self):
        asked = []
        event = HangupEvent(find_call=lambda event: asked.append(event) or "the call")
        self.assertEqual(asked, [])
        self.assertEqual((event.call, event.call, asked), ("the call", "the call", [event]))

    def test_any_body_gives_an_event_or_the_documented_error(self):
        for good in (NEW_CALL, ANSWER, HANGUP, DTMF):
            for body in mutations(good, b"&=%[]+;\x00\xff\n a5", 800):
                with suppress(WebhookError):
                    self.assertIsInstance(parse_event(body, "newCall"), sc.CallEvent)

    def test_a_further_leg_is_told_from_the_first(self):
        for orig, first in [(b"", True), (b"&origCallId=123456", True), (b"&origCallId=", True),
                            (b"&origCallId=1", False)]:
            self.assertIs(parse_event(NEW_CALL + orig, "newCall").first_leg, first)

    NO_FORM = "the body is not a form (application/x-www-form-urlencoded)"
    REFUSED = (  # body, event of the path, status, reason
        (b"hello", "newCall", 400, NO_FORM),
        (b'{"event": 1}', "newCall", 400, NO_FORM),
        (b"callId=1&callId=2", "newCall", 400, "the form has callId more than once"),
        (b"event=dtmf&event=hangup", "newCall", 400, "the form has event more than once"),
        (b"&".join([b"a=b"] * 1001), "newCall", 400, "the form has more than 1000 fields"),
        (b"callId=1", "", 404, "no event is named"),
        (b"", "", 404, "no event is named"),
    )

    def test_what_is_no_event_is_refused(self):
        for body, default, *refused in self.REFUSED:
            with self.subTest(body[:30]), self.assertRaises(WebhookError) as caught:
                parse_event(body, default)
            self.assertEqual([caught.exception.status, caught.exception.reason], refused)


# ---- Actions and XML ----

class ActionTest(TestCase):
    NUMBER = "<Number>4915799912345</Number>"
    ROWS = (  # from sipgate's API reference
        (f"<Dial>{NUMBER}</Dial>", dial(" +49 (157) 999-123/45")),
        ("<Dial><Voicemail /></Dial>", voicemail()),
        (f'<Dial anonymous="true">{NUMBER}</Dial>', dial("4915799912345", anonymous=True)),
        (f'<Dial callerId="492111234567">{NUMBER}</Dial>',
         dial("4915799912345", caller_id="492111234567")),
        (f"<Dial>{NUMBER}<Number>492111234567</Number></Dial>",
         dial("4915799912345", "492111234567")),
        ("<Play><Url>http://example.com/example.wav</Url></Play>",
         play("http://example.com/example.wav")),
        ('<Gather onData="http://localhost:3000/dtmf" maxDigits="3" timeout="10000"><Play>'
         "<Url>https://example.com/example.wav</Url></Play></Gather>",
         gather("http://localhost:3000/dtmf", play="https://example.com/example.wav",
                max_digits=3, timeout_ms=10000)),
        ("<Reject />", reject()),
        ('<Reject reason="busy" />', reject("busy")),
        ("<Hangup />", hang_up()),
        # A gather without a URL comes back to us with its state.
        ('<Gather onData="http://x/on-data?state=a%26b+%C3%BC" maxDigits="1" timeout="2000" />',
         gather(state="a&b ü")),
        ('<Gather onData="https://y/?a=b&amp;state=s" maxDigits="1" timeout="2000" />',
         gather("https://y/?a=b", state="s")),
    )
    DIGITS = ("text of digits that begin with the country code, without 0 or 00, such as "
              "'4915799912345'")
    URL = "a URL that begins with http:// or https://"
    WHOLE = "a whole number of 1 or more"
    WRONG = (  # what builds it, the argument, its values, what was expected
        (lambda numbers: dial(numbers), "numbers", (
            "anonymous", "", "4\x001", "٤٩", "+49 (0) 2", ["1"], 4921, "0157123", "0049157"),
         DIGITS),
        (partial(dial, "1"), "caller_id", ("me",), DIGITS),
        (partial(dial, "1"), "anonymous", ("yes",), "True or False"),
        (play, "url", ("a.wav", "http://:80/x", "http:///x", "http://x/\x0b", "http://x/ b"), URL),
        (gather, "url", ("/on-data",), URL),
        (partial(gather, state="s"), "url", ("http://x/#f",), URL),
        (gather, "play", ("x",), URL),
        (gather, "max_digits", (0, True), WHOLE),
        (gather, "timeout_ms", (0.5,), WHOLE),
        (gather, "state", (1,), "text"),
        (reject, "reason", ("later",), "'rejected' or 'busy'"),
    )

    def test_each_action_reads_as_in_the_reference(self):
        for expected, action in self.ROWS:
            self.assertEqual(response_xml(action, "http://x").decode(),
                             '<Response onAnswer="http://x/on-answer" onHangup="http://x/on-hangup"'
                             f">{expected}</Response>\n")

    def test_what_sipgate_would_not_understand_cannot_be_built(self):
        for build, name, values, expected in self.WRONG:
            for value in values:
                with self.subTest(f"{name} {value!r}"), self.assertRaises(ValueError) as caught:
                    build(**{name: value})
                self.assertEqual(str(caught.exception), f"{name} is {value!r}: expected {expected}")
        for count in (0, 6):
            said = f"numbers is {count}: expected 1 to 5"
            self.assertRaisesRegex(ValueError, said, dial, *"1" * count)
        self.assertRaises(ValueError, gather, state="\ud800")
        self.assertRaises(ValueError, response_xml, gather())


# ---- Worker ----

class WorkerTest(TestCase):
    def test_what_queues_up_is_done_together_in_order_and_again_if_it_failed(self):
        go_on, batches = Event(), []

        def work(batch):
            batches.append(batch[:])
            go_on.wait(10)
            if len(batches) == 2:
                batch.clear()  # it failed

        change(self, sc.Worker, "BATCH", 4)
        worker = sc.Worker("test", work, 10)
        worker.put(0)
        wait_until(lambda: batches)
        self.assertEqual([worker.put(n) for n in range(1, 11)], [True] * 9 + [False])
        go_on.set()
        self.assertEqual(worker.finish(5), [])
        self.assertEqual(batches, [[0], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [9]])

    def test_an_error_of_ours_ends_no_thread(self):
        done = []
        worker = sc.Worker("test", lambda batch: done.extend(1 / n for n in batch), 10)
        with diagnostics("an error in this program"):
            worker.put(0)
            wait_until(lambda: not worker.items)
            worker.put(1)
            self.assertEqual((worker.finish(5), done), ([], [1]))


# ---- Call log ----

class Failing:
    """A database whose commit fails, before or after it has happened."""

    def __init__(self, inner, is_committed):
        self.inner, self.is_committed = inner, is_committed

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def execute(self, statement, *values):
        if statement != "COMMIT":
            return self.inner.execute(statement, *values)
        if self.is_committed:
            self.inner.execute(statement)
            raise MemoryError
        raise sqlite3.OperationalError("disk I/O error")


class QuickLog(CallLog):
    """A log that waits for little, with a clock that tests can set."""

    LOCK_SECONDS, QUIET_SECONDS, now = 0.02, 0, 1e9

    def clock(self):
        return self.now

    def take(self, call_id, digest=None, body=b"a=b"):
        return self.record(NewCallEvent(call_id=call_id, body=body), self.now, digest)


class CallLogTest(WithFolder):
    def open(self, path=None, **more):
        log = type("Log", (QuickLog,), more)(path or self.path, 30)
        self.addCleanup(log.close, 5)
        return log

    def rows(self, what="call_id"):
        return stored(self.path, what)

    def test_record_returns_once_an_event_is_on_disk_with_its_links(self):
        log = self.open()
        for orig, xcid in (("1", "ab"), ("0", ""), ("", "")):
            self.assertTrue(log.record(HangupEvent(
                call_id="1", orig_call_id=orig, xcid=xcid, body=b"\xff\0"), 1e9, None))
        log.record(sc.CallEvent(event="reply", call_id="1"), 1e9, None)  # not one of ours
        self.assertEqual(self.rows("event || quote(orig_call_id) || quote(xcid) || hex(body)"), [
            "hangupNULL'ab'FF00", "hangup'0'NULLFF00", "hangupNULLNULLFF00", "?replyNULLNULL"])
        # The commit has reached the disk itself, of which only a power cut could tell.
        self.assertEqual(log._database.execute("PRAGMA synchronous").fetchone(), (2,))

    def test_an_exact_repeat_is_stored_once(self):
        log = self.open()
        digests = (b"d", b"d", b"e", None, None)
        self.assertEqual([log.take("1", digest) for digest in digests],
                         [True, False, True, True, True])
        second = self.open()  # which shares the file
        self.assertFalse(second.take("1", b"d"))
        for one, call_id in ((second, "2"), (log, "3"), (log, "4"), (log, "5")):
            one.take(call_id, body=call_id.encode())
        self.assertEqual(sorted(self.rows()), list("11112345"), "in one microsecond")

    def test_ids_are_the_time_of_receipt_made_unique(self):
        log = self.open()
        for seconds in (0, 0, 5, 4, -3590, -86400):
            log.now = 1e9 + seconds
            log.take("1")
        log.close(5)
        self.open().take("later")
        # A clock that was far ahead is not followed, nor forgotten at a restart.
        self.assertEqual(self.rows("id - 1e15"), [
            -86_400_000_000, 0, 1, 5_000_000, 5_000_001, 5_000_002, 5_000_003])

    @on_posix("permissions")
    def test_nobody_else_can_read_it(self):
        Path(self.path).touch(0o644)
        self.open().take("1")
        self.assertEqual(
            {entry.name: oct(entry.stat().st_mode & 0o777) for entry in os.scandir()},
            dict.fromkeys(("calls.db", "calls.db-wal", "calls.db-shm"), "0o600"))

    @on_posix("devices")
    def test_what_cannot_be_a_call_log_is_refused_and_left_alone(self):
        os.mkfifo("pipe", 0o644)
        alter("foreign", "CREATE TABLE events(a); PRAGMA application_id=1")
        text = self.write("text", "numbers I want to keep")
        self.open("version").close(5)
        alter("version", "PRAGMA user_version=1")
        for said, *paths in [
                ("it is no file", "pipe", os.devnull, self.folder),
                ("it is not a call log of this version of the program, and is left alone",
                 "foreign", text, "version")]:
            for path in paths:
                before = os.stat(path).st_mode
                with self.subTest(path), self.assertRaisesRegex(SettingsError, said):
                    self.open(path)
                self.assertEqual(os.stat(path).st_mode, before)
        self.assertEqual(Path(text).read_text(), "numbers I want to keep")

    @on_posix("links")
    def test_a_damaged_file_is_put_aside_and_what_comes_then_is_stored(self):
        aside = self.path + ".damaged-1000000000"
        os.symlink(self.path, "link")
        log = self.open("link")
        log.take("1")
        log.close(5)
        damage(self.path)
        with diagnostics() as said:
            log = self.open("link")
            catch_up(log)
        self.assertIn(f"the call log was damaged; it is now {aside}, and a new one is begun", said)
        self.assertTrue(log.take("2"))
        self.assertEqual((os.path.islink("link"), os.path.exists(aside), self.rows()),
                         (True, True, ["2"]))
        alter(self.path, "PRAGMA wal_checkpoint(TRUNCATE)")
        damage(self.path)  # while it runs
        log.take("3")
        log.take("4")
        catch_up(log)
        self.assertEqual(self.rows()[-2:], ["3", "4"])

    def test_a_locked_log_catches_up_in_order_as_far_as_it_has_room(self):
        log = self.open(QUEUE=5)
        with diagnostics() as said:
            with database_at(self.path) as other, within(0.5):  # only the first waits
                other.execute("BEGIN EXCLUSIVE")
                self.assertEqual([log.take(call_id) for call_id in "1234567"], [None] * 7)
                self.assertEqual(log.behind, "database is locked")
            catch_up(log)
        self.assertRegex("\n".join(said), "(?s)no room: newCall of call 6 is not stored.*call 7 "
                         "is not stored.*caught up: all events are stored$")
        self.assertEqual(self.rows(), list("12345"))
        self.assertTrue(log.take("8"))

    def test_locked_at_the_start_it_starts_all_the_same(self):
        self.open().close(5)
        with database_at(self.path) as other:
            other.executescript("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE")
            log = self.open()
            self.assertIn("locked", log.behind)
            self.assertIsNone(log.take("1"))
        catch_up(log)
        self.assertEqual(self.rows(), ["1"])

    @on_posix("an open file stays where it is")
    def test_a_replaced_file_keeps_what_it_had(self):
        for is_replaced in (False, True):
            self.open("other").close(5)
            log = self.open()
            for n in range(20):
                log.take(str(n))
            with diagnostics("the file was deleted or replaced") as said:
                os.replace(self.path, "old")
                if is_replaced:
                    os.replace("other", self.path)
                wait_until(lambda said=said: said)
                wait_until(lambda log=log: log.take("new"))
            log.close(5)
            self.assertEqual(stored("old"), [str(n) for n in range(20)])
            self.assertEqual(set(self.rows()), {"new"})
            os.remove(self.path)

    def test_the_stop_waits_for_no_disk_that_hangs(self):
        log, reached, go_on = self.open(), Event(), gate(self)

        class Hanging(Failing):
            def execute(self, *statement):
                reached.set()
                go_on.wait(3)
                return self.inner.execute(*statement)

        log._database = Hanging(log._database, "")
        log._newest, log._remove_at = log.now, 0
        self.assertTrue(reached.wait(5))
        with within(1):
            log.close(0.1)

    def test_an_error_in_the_commit_loses_and_repeats_nothing(self):
        log = self.open()
        for n, digest in enumerate((None, b"d", None, b"e")):
            log._database = Failing(log._database, n > 1)
            with diagnostics("behind (MemoryError)" if n > 1 else "behind (disk I/O"):
                log.take(str(n), digest, b"%d" % n)
            catch_up(log)
        self.assertEqual((self.rows(), self.rows("id - 1e15")), (list("0123"), [0, 1, 2, 3]))

    def test_at_the_end_all_that_is_queued_is_stored_or_named(self):
        log = self.open()
        for n in range(500):
            log.record_reply(NewCallEvent(call_id=str(n)), b"")
        log.close(10)
        self.assertEqual(self.rows("event || call_id"), [f"reply{n}" for n in range(500)])
        self.assertFalse(os.path.exists(self.path + "-wal"), "the database is closed")
        log = self.open()
        with diagnostics() as said, database_at(self.path) as other:
            other.execute("BEGIN EXCLUSIVE")
            log.take("a")
            log.take("b")
            log.close(0.1)
        self.assertIn("events could not be stored, of the calls a, b", said)

    def fill(self, count=300, old=40.0):
        """Store rows of that age (in days) and new ones in turn."""
        before = 10**15 - int(DAY * 1e6 * old)
        self.store(plain_row(10**15 + n, "", f"new{n}", b"from=4988800011") if n % 2 else
                   plain_row(before + n, "", "OLDCALL", b"from=49999911122") for n in range(count))

    def is_clean(self, log):
        """Whether no old number is left anywhere; the next try is now."""
        log._remove_at, found = 0, b""
        for path in Path().iterdir():
            with suppress(FileNotFoundError):  # the removal may be faster
                found += path.read_bytes()
        return b"OLDCALL" not in found and b"49999911122" not in found

    def test_removal_leaves_no_byte_and_delays_no_webhook(self):
        self.fill(2000)
        reader = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("BEGIN")  # in the way of the checkpoint for a while
        reader.execute("SELECT count(*) FROM events").fetchone()
        log = self.open(FIRST_SECONDS=0.01, STEP_ROWS=50)
        wait_until(lambda: len(self.rows()) < 2000)
        for n in range(5):
            self.assertTrue(log.take(f"between{n}"))
            self.assertIn(f"between{n}", self.rows())
        self.assertIn("OLDCALL", self.rows(), "they came in its midst")
        rewrite, rewritten = sc.rewrite, []
        change(self, sc, "rewrite", lambda *given: (rewrite(*given), rewritten.append(given)))
        with diagnostics("(another program reads it)") as said:
            wait_until(lambda: said)
            log._remove_at = 0
            wait_until(lambda: len(said) > 1)
        self.assertLessEqual(len(rewritten), 1, "the next try does not begin anew")
        reader.execute("COMMIT")
        wait_until(lambda: self.is_clean(log))
        self.assertEqual(len(self.rows()), 1005)

    def test_what_is_deleted_is_overwritten_at_once(self):
        self.fill(2000)
        log = self.open(FIRST_SECONDS=0.01, QUIET_SECONDS=99)
        wait_until(lambda: "OLDCALL" not in self.rows())
        log.close(5)
        self.assertLess(Path(self.path).read_bytes().count(b"49999911122"), 20)

    def test_the_file_is_rewritten_in_a_quiet_minute(self):
        self.fill()
        begun, rewrite = Event(), sc.rewrite

        def last(database, folder):
            begun.set()
            sc.rewrite = rewrite
            database.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) "
                             "SELECT count(*) FROM n")

        change(self, sc, "rewrite", last)
        log = self.open(FIRST_SECONDS=0, QUIET_SECONDS=60)
        wait_until(lambda: log._remove_at > time.monotonic() + 50)
        self.assertEqual((len(self.rows()), begun.is_set()), (150, False))
        log.now += 61
        log._remove_at = 0
        self.assertTrue(begun.wait(10))
        self.assertTrue(all(log.take("1") for _ in range(99)))
        log.now += 61
        wait_until(lambda: self.is_clean(log))

    def test_without_room_the_file_is_not_rewritten(self):
        self.fill()
        change(self, shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
        with diagnostics("there is no room to write") as said:
            self.open(FIRST_SECONDS=0.01)
            wait_until(lambda: said)

    def test_a_clock_ten_years_ahead_removes_nothing(self):
        self.fill()
        log = self.open(FIRST_SECONDS=0.01, now=1e9 + 3650 * DAY)
        wait_until(lambda: log._remove_at > time.monotonic() + 3600)
        self.assertEqual(len(self.rows()), 300)
        log._believe_at = log._remove_at = 0  # once it has held for a day it is believed
        wait_until(lambda: not self.rows())

    def test_a_clock_that_is_put_right_ends_the_removal(self):
        self.fill(2000, old=29.5)
        log = self.open(FIRST_SECONDS=0.01, STEP_ROWS=20, now=1e9 + 20 * 3600)
        wait_until(lambda: len(self.rows()) < 2000)
        log.now = 1e9
        wait_until(lambda: os.path.getsize(self.path + "-wal") == 0)
        self.assertIn("OLDCALL", self.rows())

    def test_what_a_removal_cut_short_has_left_goes_next(self):
        old, young = "calls.db.damaged-1", "calls.db.damaged-2"
        for name, age in ((old, 31), (young, 29)):
            os.utime(self.write(name, ""), (1e9 - age * DAY,) * 2)
        self.fill()
        alter(self.path, "PRAGMA secure_delete=OFF; DELETE FROM events WHERE call_id = 'OLDCALL'")
        log = self.open(FIRST_SECONDS=0.01)
        wait_until(lambda: self.is_clean(log))
        self.assertEqual([os.path.exists(name) for name in (old, young)], [False, True])


# ---- Receiving ----

TRIAL = Settings()
LIVE = Settings(webhook_url="https://x.example")
PATHED = Settings(webhook_url="https://x.example/3f")
LIVE_XML = (b'<Response onAnswer="https://x.example/on-answer" '
            b'onHangup="https://x.example/on-hangup" />\n')
TRIAL_XML = LIVE_XML.replace(b"https://x.example", b"http://localhost:8080")
BARE_XML = b"<Response />\n"
DISCARDED = b"This response will be discarded"
MISSING, MALFORMED, NO_MATCH = (
    (403, f"signature {fault}, see VERIFY_SIGNATURE")
    for fault in ("missing", "malformed", "does not match"))


class Conversation(Receiver):
    """A receiver, to which webhooks are handed as the HTTP section does."""

    def __init__(self, settings=LIVE, call_log=None, find_call=None, **functions):
        self.shown = []
        super().__init__(settings, [TEST_KEY], CallFunctions(**functions), self.shown.append,
                         call_log, find_call)

    def receive(self, target="/new-call", body=NEW_CALL, signature=None, outside=""):
        event = self.admit(target, body, signature, outside)
        deadline = time.monotonic() + self.reply_seconds
        answered = self.reply_to(event, deadline, outside)
        self.follow(answered)
        return answered.reply

    def verdict(self, *arguments, **more):
        """The status of the reply, or of the refusal and its reason."""
        try:
            return self.receive(*arguments, **more).status
        except WebhookError as error:
            return error.status, error.reason

    def signed(self, target="/new-call", body=NEW_CALL, **more):
        return self.receive(target, body, sign(body), **more)

    def events(self):
        """What has been shown, once all that follows is done."""
        wait_until(lambda: not self.your_code.hooks.items)
        return [answered.event for answered in self.shown]


class ReceiverTest(TestCase):
    def test_a_refused_signature_is_named_and_leaves_no_trace(self):
        log = new_log(self)
        talk = Conversation(LIVE, log, on_new_call=self.fail)
        for signature, refused in [
                (None, MISSING), ("x", MALFORMED), ("YWJj", MALFORMED), (sign(HANGUP), NO_MATCH)]:
            self.assertEqual(talk.verdict(signature=signature), refused)
        self.assertEqual((talk.events(), talk.refused, stored(log.path)), ([], 4, []))

    def test_nothing_is_parsed_before_it_is_verified(self):
        target, many = "/new-call?" + "a&" * 3000, b"&".join([b"a=b"] * 2000)
        for talk in (Conversation(LIVE), Conversation(TRIAL)):
            for body, signature, refused in [(b"no form", sign(b"x"), NO_MATCH),
                                             (b"no form", None, MISSING), (many, None, MISSING)]:
                self.assertEqual(talk.verdict(target, body, signature, "x.y"), refused)

    SIGNED = (  # mode, path, body, what becomes of it unsigned
        *(("on", path, body, MISSING) for path, body in FOLLOW_UPS),
        *(("new-call", path, body, 200) for path, body in FOLLOW_UPS),
        ("new-call", "/new-call", NEW_CALL, MISSING),
        ("new-call", "/on-hangup", NEW_CALL, MISSING),
        ("new-call", "/new-call", b"event=pause&callId=1", MISSING),
        ("new-call", "/on-hangup", b"event=hangup&callId=", (400, "callId is missing")),
        ("off", "/new-call", NEW_CALL, 200),
        ("off", "/new-call", b"callId=", 200),
    )

    def test_verify_signature_says_which_events_must_be_signed(self):
        for mode, path, body, unsigned in self.SIGNED:
            talk = Conversation(replace(LIVE, verify_signature=mode))
            forged = 200 if mode == "off" else NO_MATCH
            signed = 200 if b"callId=1" in body else unsigned
            self.assertEqual([talk.verdict(path, body, signature)
                              for signature in (None, sign(b"x"), sign(body))],
                             [unsigned, forged, signed], (mode, path, body))
        with self.assertRaises(WebhookError) as caught:
            Conversation().receive("/on-hangup", HANGUP)
        self.assertIn("VERIFY_SIGNATURE=new-call", caught.exception.detail)

    def test_trial_mode_needs_no_signature_from_this_machine(self):
        talk = Conversation(TRIAL)
        self.assertEqual(talk.receive().body, TRIAL_XML)
        self.assertEqual(talk.verdict(signature=sign(HANGUP)), NO_MATCH)
        self.assertEqual(talk.verdict(outside="abc.lhr.life"), MISSING)
        talk.settings = replace(TRIAL, verify_signature="new-call")
        self.assertEqual(talk.verdict("/on-hangup", HANGUP, outside="abc.lhr.life"), MISSING)

    def test_the_path_of_the_url_counts(self):
        talk = Conversation(PATHED)
        xml = LIVE_XML.replace(b".example", b".example/3f")
        self.assertEqual(talk.signed("/3f/new-call", outside="evil.example"),
                         sc.Reply(200, xml, "application/xml"))
        for path in ("/new-call", "/", "/3f/new-call/", "/3F/new-call", "/3f/new%2Dcall",
                     "/3f//new-call"):
            with diagnostics(f"a webhook came in at {path}, where nothing is: the URL at"):
                self.assertEqual(talk.verdict(path), (404, "not found"))
        self.assertEqual(talk.refused, 6)

    def test_the_body_says_which_event_it_is(self):
        other_path = "event hangup came in on /on-answer, the path of another"
        for settings, path, body, reply, warning in [
                (LIVE, "/", NEW_CALL, LIVE_XML, ""),
                (PATHED, "/3f", HANGUP, DISCARDED, ""), (PATHED, "/3f/", HANGUP, DISCARDED, ""),
                (LIVE, "/on-answer", HANGUP, DISCARDED, other_path),
                (LIVE, "/new-call", b"event=pause&callId=1", BARE_XML, "")]:
            talk = Conversation(settings, new_log(self))
            with self.subTest(path, body=body), diagnostics(warning) as said:
                self.assertEqual(talk.signed(path, body).body, reply)
                event, = talk.events()
                self.assertEqual((event.body, event.signature), (body, sign(body)))
                self.assertEqual(stored(talk.call_log.path, "body"), [body])
                self.assertEqual(len(said), bool(warning), said)
        self.assertEqual(talk.verdict("/", b"callId=1", sign(b"callId=1"))[0], 404)

    def test_your_decision_goes_out_and_is_kept(self):
        log = new_log(self)
        talk = Conversation(
            LIVE, log, on_dtmf=lambda event: dial(event.state),
            on_new_call=lambda event: gather(state=event.from_number) if event.first_leg else None)
        menu, dialled = (LIVE_XML[:-4] + b">" + xml + b"</Response>\n" for xml in (
            b'<Gather onData="https://x.example/on-data?state=492111234567" '
            b'maxDigits="1" timeout="2000" />', b"<Dial><Number>4921100</Number></Dial>"))
        further = NEW_CALL + b"&origCallId=1"
        for target, body, reply in [("/new-call", NEW_CALL, menu), ("/new-call", further, LIVE_XML),
                                    ("/on-data?state=%2B49+21100&%ff&&x", DTMF, dialled)]:
            self.assertEqual(talk.signed(target, body).body, reply)
        log.close(5)
        self.assertEqual(stored(log.path, "event, body"), [
            ("newCall", NEW_CALL), ("reply", menu), ("newCall", further), ("dtmf", DTMF),
            ("reply", dialled)])

    def test_a_repeat_is_replied_to_but_runs_and_counts_once(self):
        seen, log = [], new_log(self)
        talk = Conversation(LIVE, log, on_new_call=lambda event: hang_up(), on_hangup=seen.append)
        sent = [("/new-call", NEW_CALL), *FOLLOW_UPS, ("/on-hangup", HANGUP + b"&a=b")]
        first, second = ([talk.signed(*one) for one in sent] for _ in range(2))
        self.assertEqual((first, len(talk.events()), len(seen)), (second, 10, 2))
        self.assertEqual(len(stored(log.path)), 7, "each once, but the digit twice")
        trial = Conversation(TRIAL, log)
        for _ in range(2):
            trial.receive()
        self.assertEqual(len(stored(log.path)), 9, "in trial mode each one counts")

    def test_an_error_of_ours_or_a_gather_to_nowhere_stops_no_call(self):
        menu = Conversation(TRIAL, on_new_call=lambda event: gather())
        self.assertIn(b"<Gather", menu.receive().body)
        for talk, xml, notes in [(Conversation(LIVE, "none"), LIVE_XML, 0), (menu, BARE_XML, 1)]:
            with diagnostics() as said:
                self.assertEqual(talk.signed(outside="abc.lhr.life").body, xml)
            self.assertEqual(said[notes:],
                             ["a reply could not be made; the call goes through undecided"])


def recurse(event):
    return recurse(event)


class YourCodeTest(TestCase):
    def together(self, talk, count):
        with ThreadPoolExecutor(count) as pool:
            return [*pool.map(lambda _: talk.receive().body, range(count))]

    FAULTS = (  # on_new_call, what is said
        (lambda event: 1 / 0, r"raised ZeroDivisionError; (?!.*in _run\n).*: division by zero\n$"),
        (lambda event: sys.exit(), "raised SystemExit; the call goes on without it.*SystemExit\n$"),
        (recurse, "raised RecursionError; the call goes on without it.*in recurse\n"),
        (lambda event: "<Response />", "returned a str, not an action such"),
        (lambda event: 0, "returned a int, not an action such"),
        (lambda event: voicemail, r"returned a function, not an action such as voicemail\(\); the"),
    )

    def test_code_that_fails_is_reported_and_stops_no_call(self):
        for function, message in self.FAULTS:
            with self.subTest(message), diagnostics() as said:
                reply = Conversation(TRIAL, on_new_call=function).receive()
                self.assertEqual(reply.body, TRIAL_XML)
                self.assertRegex(said[0], f"(?s)^on_new_call {message}")

    def test_an_error_that_cannot_be_reported_costs_no_slot(self):
        class Odd(SyntaxError):
            lineno = property(lambda self: 1 / 0)

        def fail(event):
            raise Odd

        talk, errors = Conversation(TRIAL, on_new_call=fail), []
        change(self, sys, "unraisablehook", errors.append)
        with within(2):
            self.assertEqual(self.together(talk, 9), [TRIAL_XML] * 9)
        wait_until(lambda: len(errors) == 9)

    def test_late_code_is_reported_and_frees_its_slot(self):
        go_on = gate(self)
        talk = Conversation(TRIAL, on_new_call=lambda event: go_on.wait(10) and hang_up())
        talk.reply_seconds, talk.your_code.SLOT_SECONDS = 0.1, 0.05
        with diagnostics() as said:
            self.assertEqual(self.together(talk, 9), [TRIAL_XML] * 9)
        said = "\n".join(said)
        self.assertRegex(said, "(?s)on_new_call has not returned in time; .*code <lambda>")
        self.assertIn("all 8 slots", said)
        self.assertEqual(talk.health(), "", "it may only be slow")
        talk.your_code.FULL_SECONDS = 0.0
        self.assertIn("stuck: on_new_call has been running", talk.health())
        go_on.set()
        wait_until(lambda: not talk.health())
        self.assertIn(b"<Hangup />", talk.receive().body)

    def test_a_ninth_call_waits_for_a_slot(self):
        eight = Barrier(8)
        talk = Conversation(TRIAL, on_new_call=lambda event: (
            eight.wait(5), Event().wait(0.1)) and hang_up())
        talk.your_code.SLOT_SECONDS = 5
        self.assertTrue(all(b"<Hangup />" in body for body in self.together(talk, 16)))

    def test_too_many_events_for_slow_code_are_named(self):
        begun, go_on = Event(), gate(self)
        code = sc.YourCode(CallFunctions(
            on_answer=lambda event: (begun.set(), go_on.wait(10)), on_hangup=lambda event: 1 / 0))
        code.hooks.limit = 3
        with diagnostics() as said:
            code.run_later(AnswerEvent())
            begun.wait(10)
            code.SLOTS, code.FULL_SECONDS = 1, 0
            self.assertEqual(code.stuck(), "", "it may be slow")
            for _ in range(4):
                code.run_later(HangupEvent())
            self.assertEqual(said, ["on_hangup was not run: 1000 events wait for your code"] * 2)
            go_on.set()
            self.assertEqual(code.hooks.finish(5), [])
        self.assertEqual(len(said), 4, "the two that waited ran")

    def test_scanners_cannot_flood_the_diagnostics(self):
        throttle = sc.throttle(0.1)
        sc.logger.addFilter(throttle)
        self.addCleanup(sc.logger.removeFilter, throttle)
        with diagnostics() as said:
            for say, text in 2 * [(sc.logger.warning, "A %d"), (sc.logger.error, "B %d")]:
                say(text, 1)
            wait_until(lambda: sc.logger.warning("A %d", 2) or len(said) > 3)
        self.assertEqual(said[:3], ["A 1", "B 1", "B 1"])
        self.assertRegex(said[3], r"A 2 \([0-9]+ more since the last message\)")


# ---- HTTP ----

HOST_LINE = b"Host: localhost\r\n"
POST = b"POST /new-call HTTP/1.1\r\n" + HOST_LINE


def request(body=NEW_CALL, *headers, method="POST", target="/new-call", host="localhost"):
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}",
             *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def all_of(client):
    return b"".join(iter(lambda: client.recv(65536), b""))


def status_of(client):
    return int(client.recv(65536)[9:12])


class Running(WebhookServer):
    """A server on a free port, with a short patience."""

    timeout, end_seconds = 0.01, 0.3

    def __init__(self, settings=TRIAL, functions=CallFunctions(), tls=None, host="127.0.0.1",
                 **limits):
        super().__init__(host, 0, settings.base_path, tls)
        vars(self).update(limits)
        self.shown, self.is_told, self.clients = [], False, []
        self.receiver = Receiver(settings, [TEST_KEY], functions,
                                 lambda replied: self.shown.append(replied.event))
        self.thread = Thread(target=self.serve_until, args=(lambda: self.is_told,))
        self.thread.start()

    def end(self):
        for client in self.clients:
            client.close()
        self.is_told = True
        self.thread.join()
        self.stop(1)
        self.receiver.your_code.hooks.finish(1)

    def connect(self, sent=b""):
        client = socket.create_connection(self.server_address[:2], 10)
        self.clients.append(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(sent)
        return client

    def reset(self, sent):
        """Send bytes, and close the connection with a reset at once."""
        with self.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(sent)

    def exchange(self, sent):
        with self.connect(sent) as client:
            client.shutdown(socket.SHUT_WR)
            return all_of(client)

    def statuses(self, sent):
        return [int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.exchange(sent))]

    def calls(self):
        """The call ids that were shown, once all that follows is done."""
        wait_until(lambda: all(one.is_waiting for one in list(self.connections.values())))
        return [event.call_id for event in self.shown]


IMPATIENT = {"request_seconds": 0.2, "idle_seconds": 0.4, "sending_seconds": 0.2}


def run_server(test, *arguments, **options):
    running = Running(*arguments, **options)
    test.addCleanup(running.end)
    return running


class HttpTest(TestCase):
    @classmethod
    def setUpClass(cls):
        cls.running = Running()
        cls.addClassCleanup(cls.running.end)

    def check(self, rows, begin=b"", end=b""):
        """What stands between `begin` and `end` gets the status it is listed under, or several."""
        for statuses, texts in rows.items():
            expected = [statuses] if isinstance(statuses, int) else list(statuses)
            for text in texts:
                self.assertEqual(self.running.statuses(begin + text + end), expected, text[:60])

    def test_request_lines(self):
        end = b"\r\n" + HOST_LINE + b"\r\n"
        self.check({
            200: (b"GET /healthz", b"GET /healthz?a=b", b"HEAD /healthz", b"\r\nGET /healthz",
                  b"POST /new-call", b"POST /new-call?a=/x"),
            404: (b"POST /new%2Dcall", b"POST //new-call", b"BREW /teapot",
                  b"GET /" + b"a" * (8192 - 14)),
            405: (b"GET /", b"GET /new-call", b"PUT /new-call", b"POST /healthz"),
            431: (b"GET /" + b"a" * (8192 - 13),),
            400: (b"\r\n\r\nGET /healthz", b"GET  /healthz", b" GET /healthz", b"GET\t/healthz",
                  b"get /healthz", b"ABCDEFGHIJKLMNOPQ /healthz", b"GET http://localhost/healthz",
                  b"OPTIONS *", b"GET /health\0z", b"GET /health\xffz"),
        }, end=b" HTTP/1.1" + end)
        self.check({
            200: (b" HTTP/1.0",),
            400: (b"", b"  HTTP/1.1", b" HTTP/1.1 ", b" HTTP/1.1\nA: b", b" HTTP/1.2",
                  b" HTTP/2.0", b" HTTP/01.1", b" http/1.1"),
        }, b"GET /healthz", end)

    def test_header_lines(self):
        wide = b"A: " + b"b" * 8189
        self.check({
            200: (
                b"A: \xe4\tb", b"A:", b"A:b\r\nA: c", b"!#$%&'*+-.^_`|~: b", b"A" * 64 + b": b",
                b"\r\n".join([b"A: b"] * 63), b"\r\n".join([wide] * 3),
                b"X-Forwarded-For: 1\r\nX-Forwarded-For: 2"),
            431: (b"\r\n".join([b"A: b"] * 64), b"B" + wide, b"\r\n".join([wide] * 4)),
            400: (
                b"A" * 65 + b": b", b"A: b\nC: d", b"A: b\rC: d", b"A: b\r", b" A: b",
                b"A: b\r\n c", b"A: b\r\n\tc", b"A b", b"A : b", b": b", b"A\xe4: b", b"A(: b",
                b"A: b\0", b"A: b\x0b", b"A: b\x7f", b"Content-Length: 0\x0c",
                *(name + b": " + value + b"\r\n" + name.lower() + b": " + value for name, value in (
                    (b"Host", b"localhost"), (b"Expect", b"100-continue"),
                    (b"Content-Type", b"a/b"), (b"X-Sipgate-Signature", b"a"),
                    (b"Content-Length", b"0"), (b"Transfer-Encoding", b"chunked")))),
        }, b"GET /healthz HTTP/1.1\r\n" + HOST_LINE, b"\r\n\r\n")

    def test_the_host(self):
        self.check({
            200: (b"a", b"a-b.example:8080", b"[::1]:8080"),
            400: (b"", b"a b", b"a, b", b"a/b", b"me@a", b"a:", b"a:b", b"::1"),
        }, b"GET /healthz HTTP/1.1\r\nHost: ", b"\r\n\r\n")
        self.check({
            200: (b"0",), 400: (b"1", b"0\r\nHost:")}, b"GET /healthz HTTP/1.", b"\r\n\r\n")

    def test_body_lengths(self):
        self.check({
            200: (b"8", b"8 \t", b"000000008"),
            400: (b"0000000008", b"+8", b"-8", b"8_0", b"8, 8", b"8 8", b"0x8", b"\xb2", b"",
                  b"8\r\nTransfer-Encoding: chunked"),
            413: (b"999999999",),
            (): (b"9",),  # shorter than announced: no request happened
        }, POST + b"Content-Length: ", b"\r\n\r\ncallId=1")
        self.check({
            200: (request(b""), request(b"callId=1&a=" + b"b" * 65525)),
            400: (
                request(b"a=b", method="GET", target="/healthz"),
                request(b"a=b", method="HEAD", target="/healthz")),
            413: (
                request(b"callId=1&a=" + b"b" * 65526),
                request(b"a" * 2_000_000)),  # whose rest is read, or the reply would be lost
        })

    def test_chunked_bodies(self):
        chunked, end = b"Transfer-Encoding: chunked\r\n", b"\r\n0\r\n\r\n"
        wide = b"8000\r\n" + b"a" * 0x8000
        self.check({
            200: (b"8\r\ncallId=1", b"A\r\ncallId=123\r\n000003\r\nd=1"),
            400: (
                *(size + b"\r\ncallId=1" for size in (
                    b"8;a=b", b"8 ", b" 8", b"0x8", b"+8", b"0000008", b"", b"7", b"9")),
                b"8\ncallId=1", b"8\r\ncallId=1\n", b"0\r\nTrailer: a",
                wide + b"\r\n" + wide),  # no form, but no longer than allowed
            413: (
                wide + b"\r\n" + wide + b"\r\n1\r\na", b"10001\r\n", b"1\r\na\r\n" * 30_000),
        }, POST + chunked + b"\r\n", end)
        self.check({
            200: (b"0\r\n\r\n",),
            (200, 200): (b"8\r\ncallId=1" + end + request(),),
            (): (b"0\r\n\r", b"8\r\ncallId=1\r\n"),
        }, POST + chunked + b"\r\n")
        self.check({
            200: (b"transfer-encoding:Chunked ",),
            400: (chunked + b"Content-Length: 5", b"Transfer-Encoding: \x0bchunked"),
            501: [b"Transfer-Encoding: " + coding for coding in (
                b"chunked, chunked", b"identity", b"gzip, chunked", b"gzip", b"")],
        }, POST, b"\r\n" + end)
        self.check({400: (
            b"POST /new-call HTTP/1.0", b"GET /healthz HTTP/1.1", b"HEAD /healthz HTTP/1.1",
            b"PUT /new-call HTTP/1.1")}, end=b"\r\n" + HOST_LINE + chunked + end)

    def test_expectations(self):
        asking = "Expect: 100-continue"
        sent = request(b"a=b", asking)
        self.check({
            (100, 200): (sent, request(b"a=b", "Expect: 100-Continue")),
            200: (sent.replace(b"HTTP/1.1", b"HTTP/1.0"),),
            (100, 404): (request(b"a=b", asking, target="/none"),),
            (100, 405): (request(b"a=b", asking, method="PUT"),),
            413: (request(b"a" * 65537, asking),),
            417: (request(b"a=b", "Expect: 200-ok"),)})
        with self.running.connect(sent[:-3]) as client:
            self.assertEqual(client.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
            client.sendall(sent[-3:])
            self.assertEqual(status_of(client), 200)

    def test_a_request_hidden_in_a_body_is_never_answered(self):
        body = b"0\r\n\r\n" + request(b"callId=H", target="/on-hangup")
        # Without the 5 that would be the length of the first chunk alone.
        length, pieces = b": %d\r\n" % len(body), b" \t\r\n\0,;:x_+-C678"
        coding = b"Transfer-Encoding: chunked\r\n"
        for one, two in [*((other, length) for other in mutations(coding, pieces, 150)),
                         *((coding, other) for other in mutations(length, pieces, 50))]:
            for head in (one + b"Content-Length" + two, b"Content-Length" + two + one):
                self.running.exchange(POST + head + b"\r\n" + body)
        self.assertNotIn("H", self.running.calls())

    def test_requests_in_two_segments_get_the_same_reply(self):
        chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n8\r\ncallId=1\r\n0\r\n\r\n"
        for sent in (request(b"a=b"), chunked, b"\r\nGET /healthz HTTP/1.0\r\n\r\n",
                     b"GET / HTTP/1.1\r\nA : b\r\n\r\n", b"GET / HTTP/1.1\nHost: a\n\n"):
            whole = self.running.statuses(sent)
            for cut in range(1, len(sent)):
                with self.running.connect(sent[:cut]) as client:
                    client.sendall(sent[cut:])
                    client.shutdown(socket.SHUT_WR)
                    self.assertEqual([status_of(client)], whole, sent[:cut])

    def test_requests_of_a_connection_are_answered_in_order(self):
        self.check({
            (200, 404, 405, 200, 400, 200): (
                request() + request(b"a=b" * 9000, target="/none")
                + request(target="/healthz") + request(ANSWER, target="/on-answer")
                + request(b"x") + request(),),
            400: (b"GET / HTTP/1.1\r\n\r\n" + request(),),  # unread input ends it
            200: (
                *(request(NEW_CALL, "Connection: " + options) + request() for options in (
                    "close", "keep-alive, CLOSE", "keep-alive\r\nConnection: close")),
                request(NEW_CALL, "Connection: keep-alive").replace(b"1.1", b"1.0") + request()),
        })

    def test_a_reply_is_complete_and_names_no_software(self):
        begin = r"\AHTTP/1\.1 {}\r\nDate: \w\w\w, \d\d \w\w\w \d+ \d\d:\d\d:\d\d GMT\r\n"
        for sent, status, rest in [
                (request(), "200 OK",
                 "Content-Type: application/xml\r\nContent-Length: 99\r\n\r\n<Response .*/>\n"),
                (request(HANGUP, "Connection: close", target="/on-hangup"), "200 OK",
                 "Content-Type: text/plain; charset=utf-8\r\nContent-Length: 31\r\n"
                 "Connection: close\r\n\r\nThis response will be discarded"),
                (request(b"", method="GET"), "405 Method Not Allowed",
                 "(?s:.*)\r\nAllow: POST\r\nX-Instance: [0-9a-f]{16}\r\n\r\n"
                 "takes POST from sipgate\n"),
                (request(target="/healthz"), "405 Method Not Allowed",
                 "(?s:.*)\r\nAllow: GET, HEAD\r\n(?s:.*)")]:
            self.assertRegex(self.running.exchange(sent).decode(),
                             begin.format(status) + rest + r"\Z")

    def test_health(self):
        def health(method="GET"):
            sent = request(b"", method=method, target="/healthz")
            return re.search(rb" (\d+) .*\r\nX-Instance: (\w+)\r\nX-Refused: (\d+).*\r\n\r\n(.*)",
                             self.running.exchange(sent), re.DOTALL).groups()

        instance, refused = self.running.instance.encode(), self.running.receiver.refused
        self.assertEqual(health(), (b"200", instance, b"%d" % refused, b"ok\n"))
        self.running.exchange(request(NEW_CALL, "X-Sipgate-Signature: x"))
        self.assertEqual(health("HEAD"), (b"200", instance, b"%d" % (refused + 1), b""))

    def test_no_text_of_the_request_comes_back(self):
        for sent in (request(method="EVIL"), request(target="/EVIL"), request(b"", "EVIL: EVIL"),
                     b"EVIL\r\n\r\n", request(b"event=EVIL&EVIL=1&EVIL=2")):
            self.assertNotIn(b"EVIL", self.running.exchange(sent))

    def test_a_page_of_another_site_cannot_play_sipgate(self):
        self.check({403: (
            *(request(NEW_CALL, header + ": 1.2.3.4") for header in (
                "Origin", "X-Forwarded-For", "Via", "Forwarded", "X-Real-IP", "Sec-Fetch-Site",
                "CF-Connecting-IP")),
            request(host="abc.lhr.life"), b"POST /new-call HTTP/1.0\r\n\r\n")})

    def test_the_documented_request_is_taken_through_a_tunnel(self):
        host = "gwen.fuglu.net:3000"
        body = (b"event=newCall&direction=in&from=anonymous&to=445603000514"
                b"&callId=4932215337270853042")
        sent = request(
            body, "Accept: application/xml, text/plain, text/html", "Accept-Charset: utf-8",
            "User-Agent: sipgate.io", "X-SIPGATE-JOBS: http://www.sipgate.de/jobs",
            "Content-Type: application/x-www-form-urlencoded; charset=UTF-8",
            "Accept-Encoding: gzip,deflate", "Via: 1.1 localhost (squid/3.1.20)",
            "X-Forwarded-For: 217.10.77.113", "Cache-Control: max-age=259200",
            "Connection: keep-alive", f"X-Sipgate-Signature: {sign(body)}",
            target="/", host=host)
        with diagnostics(f"for {host}; restart with --url https://{host} to get"):
            client = self.running.connect(sent[:-len(body)])
            client.sendall(body)  # in two segments, as it came
            self.assertRegex(client.recv(65536), b"(?s)^HTTP/1.1 200 .*\r\n\r\n" + BARE_XML)

    def test_a_tls_hello_is_closed_with_a_message(self):
        with diagnostics("https on the http port: the tunnel"):
            self.assertEqual(all_of(self.running.connect(b"\x16\x03\x01\x02")), b"")

    def test_ipv6_can_be_listened_on(self):
        try:
            running = run_server(self, host="::1")
        except OSError:
            self.skipTest("a machine without IPv6")
        self.assertEqual(running.statuses(request(host="[::1]:8080")), [200])

    def test_clients_that_go_away_leave_no_trace(self):
        sent = request(NEW_CALL, "Content-Type: application/x-www-form-urlencoded")
        with diagnostics() as said:
            for part in (b"", b"POST", sent[:-5], sent[:40]):
                self.assertEqual(self.running.exchange(part), b"")
            for _ in range(20):
                self.running.reset(sent * 3)
            wait_until(lambda: not self.running.connections)
        self.assertEqual((said, self.running.statuses(sent)), ([], [200]))

    def test_a_wrong_content_type_is_taken_with_a_warning(self):
        with diagnostics("a webhook came without the Content-Type that sipgate sends") as said:
            for kind in ("application/X-www-form-urlencoded;charset=UTF-8", "text/plain"):
                sent = request(NEW_CALL, "content-type: " + kind)
                self.assertEqual(self.running.statuses(sent), [200])
        self.assertEqual(len(said), 1)

    def test_any_head_gives_a_value_or_the_documented_error(self):
        good = request(b"", "Content-Type: a/b", "X-Forwarded-For: 1", "Connection: close")
        for head in mutations(good, b"\r\n\0 :\t\x7f\xffA1/,", 5000):
            with suppress(WebhookError, EOFError):
                found = sc.read_head(io.BytesIO(head))
                sc.outside_host(found.headers)
                sc.body_length(found)


class TimeLimitTest(TestCase):
    @classmethod
    def setUpClass(cls):
        cls.running = Running(**IMPATIENT)
        cls.addClassCleanup(cls.running.end)

    def test_what_comes_too_slowly_is_closed_and_not_recorded(self):
        slow = request(b"callId=slow")
        connections = [self.running.connect(sent) for sent in (b"", b"POST /new", slow[:-1], b"")]
        with suppress(OSError):  # a byte now and then does not stretch the limit
            for byte in slow:
                connections[-1].sendall(bytes([byte]))
                Event().wait(0.02)
        for client in connections:
            with client, suppress(ConnectionResetError):
                self.assertEqual(all_of(client), b"")
        self.assertNotIn("slow", self.running.calls())

    def test_idle_connections_are_kept_and_each_head_has_its_limit(self):
        for sent, least, most in [(b"", 0.35, 5), (b"POST ", 0, 0.38)]:
            with self.running.connect(request()) as client:
                self.assertEqual(status_of(client), 200)
                began = time.monotonic()
                client.sendall(sent)
                self.assertEqual(client.recv(65536), b"")
                self.assertTrue(least < time.monotonic() - began < most)

    def test_a_reply_that_nobody_takes_ends_the_connection(self):
        self.running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with within(10), socket.socket() as client, suppress(OSError):
            client.settimeout(10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(self.running.server_address)
            while True:
                client.sendall(request(b"", method="GET", target="/healthz") * 100)
        wait_until(lambda: not self.running.connections)


class CapTest(TestCase):
    def setUp(self):
        self.running = run_server(self, max_connections=5, functions=CallFunctions(  # one is free
            lambda event: (event.call_id != "slow" or self.go_on.wait(10)) and None))
        self.go_on = gate(self)

    def connect(self, sent=b""):
        """A connection that the server knows."""
        connection = self.running.connect(sent)
        here = f"raddr={connection.getsockname()}"
        wait_until(lambda: here in str(list(self.running.connections)))
        return connection

    def without_thread(self, *state):
        """A connection that the server knows, and no thread of it serves."""
        sock, known = socket.socket(), self.running.connections
        self.addCleanup(sock.close)
        self.addCleanup(known.pop, sock)
        known[sock] = sc.Connection(sock, *state)
        return known[sock]

    def assert_answered(self, *connections):
        self.assertEqual([status_of(connection) for connection in connections],
                         [200] * len(connections))

    def test_the_longest_waiting_makes_room_and_no_idle_one(self):
        self.running.spared_seconds = 0
        idle = self.connect(request())
        self.assert_answered(idle)
        first, second, third = self.connect(), self.connect(b"POST /new"), self.connect()
        self.assertIn(b"\r\nConnection: close\r\n", self.running.exchange(request()), "with notice")
        self.assertEqual(first.recv(1), b"")
        second.sendall(request()[9:])
        for connection in (third, idle):
            connection.sendall(request())
        self.assert_answered(second, third, idle)

    def test_only_what_waits_ends_and_what_has_come_is_replied_to(self):
        server, theirs = self.running, self.connect()
        connection, = server.connections.values()
        with server._changed:  # which its thread needs to go on
            self.assertFalse(server._make_room(), "it has just come")
            connection.deadline -= 1
            theirs.sendall(request())
            self.assertEqual([server._make_room(), server._make_room()], [True, False])
        if sys.platform == "linux":  # others may drop what has come
            self.assert_answered(theirs)

    def test_a_request_complete_too_late_is_not_replied_to(self):
        server, connection = self.running, self.without_thread(time.monotonic() + 10)
        self.assertTrue(server.go_on(connection.sock, 10, False))
        for rest, is_stopping, goes_on in [(-1, False, [False, False]), (9, True, [False, True])]:
            connection.deadline, server.is_stopping = time.monotonic() + rest, is_stopping
            self.assertEqual([server.go_on(connection.sock, 10, is_waiting)
                              for is_waiting in (True, False)], goes_on)

    def test_whoever_sends_a_byte_and_no_more_makes_room(self):
        with within(1):
            for _ in range(12):
                self.connect(b"P")
                self.assertEqual(self.running.statuses(request()), [200])

    def test_connections_that_do_not_end_leave_room_for_others(self):
        for _ in range(5):
            self.without_thread(0.0, False)
        with within(2):
            self.assertEqual(self.running.statuses(request()), [200])

    def test_what_is_in_flight_is_never_chosen(self):
        busy = [self.connect(request(b"callId=slow")) for _ in range(5)]
        known = self.running.connections
        wait_until(lambda: not any(one.is_waiting for one in known.values()))
        waiting = self.running.connect(request())
        waiting.settimeout(0.2)
        self.assertRaises(socket.timeout, waiting.recv, 1)
        waiting.settimeout(10)
        self.go_on.set()
        self.assert_answered(*busy, waiting)


class TlsTest(WithFolder):
    def setUp(self):
        super().setUp()
        self.use(CERTIFICATES[0])
        self.running = run_server(self, tls=sc.TlsFiles(*self.paths), **IMPATIENT)

    def use(self, certificate, key=""):
        self.paths = self.write("cert.pem", certificate), self.write("key.pem", key or certificate)

    def served(self, sent=request()):
        """The status that comes back, and the number of the certificate it came with."""
        context = ssl._create_unverified_context()
        with self.running.connect() as client, context.wrap_socket(client) as tls:
            tls.sendall(sent)
            certificate = ssl.DER_cert_to_PEM_cert(tls.getpeercert(True))
            return status_of(tls), [certificate in pem for pem in CERTIFICATES].index(True)

    def test_a_webhook_over_https(self):
        self.assertEqual([self.served(), self.served(b"nonsense\r\n\r\n")], [(200, 0), (400, 0)])
        with suppress(OSError):  # http on the https port
            self.assertNotIn(b"200", self.running.exchange(request()))
        self.assertEqual(self.running.tls.context().minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_silent_connections_hold_up_nobody_and_are_closed(self):
        for sent in (b"", b"\x16\x03\x01", *[b""] * 20):
            self.running.connect(sent)
        with within(1):  # each of them would take 0.2
            self.assertEqual(self.served(), (200, 0))
        wait_until(lambda: not self.running.connections)

    def test_a_renewed_pair_is_used_as_soon_as_it_matches(self):
        self.use(CERTIFICATES[1], CERTIFICATES[0])
        self.assertRaisesRegex(SettingsError, "and the key that belongs to it",
                               sc.TlsFiles, *self.paths)
        with diagnostics() as said:
            self.assertEqual([self.served(), self.served()], [(200, 0)] * 2)
        self.assertEqual(sum("the old pair stays in use" in line for line in said), 1)
        os.remove(self.paths[0])
        self.assertEqual(self.served(), (200, 0))
        self.use(CERTIFICATES[1])
        self.assertEqual(self.served(), (200, 1))


class YourCodeOverHttpTest(TestCase):
    def serve(self, **functions):
        running = run_server(self, functions=CallFunctions(**functions))
        self.go_on = gate(self)
        return running

    def test_answer_and_hangup_run_in_order_after_the_reply_taken_or_not(self):
        seen = []

        def look(event):
            self.go_on.wait(10)
            seen.append(event.event)

        running = self.serve(on_answer=look, on_hangup=look)
        hangup = request(HANGUP, target="/on-hangup")
        self.assertEqual(running.statuses(request(ANSWER, target="/on-answer") + hangup), [200] * 2)
        running.reset(hangup * 2)
        self.assertEqual(seen, [])
        self.go_on.set()
        wait_until(lambda: len(seen) > 2)
        self.assertEqual(seen[:3], ["answer", "hangup", "hangup"])

    def test_an_action_that_sipgate_did_not_get_is_none(self):
        running, actions = self.serve(on_new_call=lambda event: reject()), []
        running.receiver.show = lambda replied: actions.append(replied.action)
        client = running.connect(request()[:-1])
        wait_until(lambda: running.connections)
        ours, = running.connections
        ours.shutdown(socket.SHUT_WR)
        client.sendall(request()[-1:])
        wait_until(lambda: actions)
        self.assertEqual(actions, [None])

    def test_a_stop_answers_what_is_in_flight_alone(self):
        begun = Event()
        running = self.serve(on_new_call=lambda event: (begun.set(), self.go_on.wait(10)) and None)
        busy, idle = running.connect(request()), running.connect()
        wait_until(lambda: begun.is_set() and len(running.connections) == 2)
        running.is_told = True
        running.thread.join()
        stopping = Thread(target=running.stop, args=(5,))
        stopping.start()
        self.assertEqual(idle.recv(1), b"")
        stopping.join(0.1)
        self.assertTrue(stopping.is_alive(), "it waits for the reply")
        self.go_on.set()
        self.assertEqual(status_of(busy), 200)
        stopping.join()


# ---- Calls ----

P, FIRM, MOBILE = "49157111", "4930200", "49171999"
DAY = 86400
# A flow: "seconds event leg details", separated by ";". n newCall, a answer, h hangup, d digits,
# r our reply. Details: of n who rings, of a who answers (or a number), of h the cause; then fields
# as k=v, once for a leg. origCallId is A. After it, when it is read (seconds after the first event)
# and of each call, earliest first: outcome, by whom, wait, talk; "back": it is to be rung back.
FLOWS = {
    # the golden flows of the rules
    "answered": ("0 n A Alice; 12 a A Alice; 102 h A", 200, "answered Alice 12 90"),
    "gave up": ("0 n A Alice; 25 h A cancel", 200, "missed - 25 - back"),
    "busy": ("0 n A Alice; 1 h A busy", 200, "missed - 1 - back"),
    "unknown cause": ("0 n A Alice; 8 h A chanunavail", 200, "missed - 8 - back"),
    "outgoing": ("0 n A Alice dir=out; 9 a A; 309 h A", 400, "answered - 9 300"),
    "outgoing, nobody": ("0 n A Alice dir=out; 9 h A noAnswer", 400, "unanswered - 9 -"),
    "voicemail": ("0 n A Alice; 20 h A forwarded; 20.1 n B voicemail; 20.5 a B voicemail; 50.5 h B", 60, "voicemail - 20.5 - back"),
    "voicemail that does not say so": ("0 n A Alice; 20 h A forwarded; 20.1 n B voicemail; 20.5 a B; 50.5 h B", 60, "voicemail - 20.5 - back"),
    "voicemail, A's hangup lost": ("0 n A Alice; 20.1 n B voicemail; 20.5 a B voicemail; 50.5 h B", 120, "voicemail - 20.5 - back"),
    "voicemail, B's hangup lost": ("0 n A Alice; 20 h A forwarded; 20.1 n B voicemail; 20.5 a B voicemail", DAY, "voicemail - 20.5 - back"),
    "our voicemail()": ("0 n A Alice; 0.1 r A voicemail; 3 a A; 33 h A", 60, "voicemail - 3 - back"),
    "transfer": ("0 n A Alice; 10 a A Alice; 70 n B Bob; 80 a B Bob; 90 h A; 200 h B", 300, "answered Alice,Bob 10 190"),
    "transfer, first hangup last": ("0 n A Alice; 10 a A Alice; 70 n B Bob; 80 a B Bob; 90 h B; 200 h A", 300, "answered Alice,Bob 10 190"),
    "transfer not taken": ("0 n A Alice; 10 a A Alice; 60 n B Bob; 90 h B noAnswer; 150 h A", 300, "answered Alice 10 140"),
    "no beginning": ("0 a A Alice; 60 h A", 100, "answered Alice - 60"),
    "answered, hangup lost": ("0 n A Alice; 10 a A Alice", DAY, "lost Alice 10 -"),
    "hangup alone": ("0 h A normalClearing", 100, "lost - - -"),
    "it rang, hangup lost": ("0 n A Alice", DAY, "lost - - - back"),
    "same xcid an hour later": ("0 n A Alice; 20 h A cancel; 3600 n B Bob orig=B from=49222 to=493099; 3605 a B Bob; 3665 h B", 4000, "missed - 20 - back", "answered Bob 5 60"),
    "queue, then an agent": ("0 n A; 2 a A; 40 n B Bob; 50 a B Bob; 170 h A; 170 h B", 300, "answered Bob 50 120"),
    "missed, then gave up in the queue": ("0 n A Alice; 20 h A cancel; 600 n B orig=B xcid=cd; 602 a B; 690 h B", 900, "missed - 20 - back", "answered - 2 88"),
    "Dial to a mobile": (f"0 n A Alice; 0.1 r A dial; 14 a A {MOBILE}; 74 h A", 100, f"answered {MOBILE} 14 60"),
    "rejected by us": ("0 n A; 0.1 r A reject; 0.2 h A busy", 100, "rejected - 0.2 -"),
    "seven hours": ("0 n A Alice; 10 a A Alice", 6.5 * 3600, "talking Alice 10 -"),
    "seven hours, over": ("0 n A Alice; 10 a A Alice; 25210 h A", 30_000, "answered Alice 10 25200"),
    "called back as 0049": ("0 n A Alice; 20 h A cancel; 600 n B Alice orig=B xcid=cd dir=out to=0049157111; 605 a B; 665 h B", 900, "missed - 20 -", "answered - 5 60"),
    # further ones
    "forwarded, not over yet": ("0 n A Alice; 20 h A forwarded", 70, "ringing - - -"),
    "forwarded, and nothing more": ("0 n A Alice; 20 h A forwarded", 81, "missed - 20 - back"),
    "ringing for 59 minutes": ("0 n A Alice", 3540, "ringing - - -"),
    "three-way transfer": ("0 n A Alice; 5 a A Alice; 60 n B Bob; 65 a B Bob; 70 h A; 120 n C Carl; 125 a C Carl; 130 h B; 300 h C", 400, "answered Alice,Bob,Carl 5 295"),
    "put through to a mobile": (f"0 n A Alice; 5 a A Alice; 30 n B Alice dir=out to={MOBILE}; 40 a B; 45 h A; 200 h B", 300, f"answered Alice,{MOBILE} 5 195"),
    "internal call with two legs": ("0 n A Alice dir=out to=4930201; 0.1 n B Bob from=4930200 to=4930201; 8 a B Bob; 8.1 a A; 60 h B; 60.1 h A", 100, "answered Bob 8 52.1"),
    "two strangers from one company": ("0 n A Alice xcid=a1; 20 h A cancel; 5 n B Bob orig=B xcid=b1; 9 a B Bob; 60 h B", 100, "missed - 20 -", "answered Bob 4 51"),
    "queue, then voicemail": ("0 n A; 2 a A; 60 n B voicemail; 61 a B voicemail; 90 h A; 90 h B", 200, "voicemail - 61 - back"),
    "menu, gave up": ("0 n A Alice; 0.1 r A gather; 9 h A cancel", 100, "missed - 9 - back"),
    "told by us to go": ("0 n A Alice; 0.1 r A gather; 5 d A 9; 5.1 r A hangup; 5.2 h A", 100, "rejected - 5.2 -"),
    "transfer, A's hangup lost": ("0 n A Alice; 10 a A Alice; 70 n B Bob; 80 a B Bob; 200 h B", 4000, "answered Alice,Bob 10 190"),
    "transfer, A's hangup not there yet": ("0 n A Alice; 10 a A Alice; 70 n B Bob; 80 a B Bob; 200 h B", 3000, "talking Alice,Bob 10 -"),
    "spoke, then voicemail, hangup lost": ("0 n A Alice; 10 a A Alice; 70 n B voicemail; 70.5 a B voicemail; 71 h A forwarded", DAY, "answered Alice 10 60.5"),
    "the beginning removed, then a transfer": ("0 a A Alice; 60 n B Bob; 70 a B Bob; 80 h A; 180 h B", 300, "answered Alice,Bob - 180"),
    "the same xcid after a lost hangup": ("0 n A Alice; 20 n B Bob; 40 h B cancel; 1800 n C Bob orig=C from=49222; 1805 a C Bob; 1865 h C", 3000, "missed - 40 - back", "answered Bob 5 60"),
    "group with overflow": ("0 n A Alice,Bob; 20 h A forwarded; 20.1 n B Carl,Dora; 30 a B Dora; 90 h B", 200, "answered Dora 30 60"),
    "overflow, nobody at last": ("0 n A Alice; 20 h A forwarded; 20.1 n B Bob; 40 h B forwarded; 40.1 n C Carl; 60 h C cancel", 200, "missed - 60 - back"),
    "consultation while the caller holds": ("0 n A Alice; 5 a A Alice; 30 n B Bob; 35 a B Bob; 50 h B; 100 h A", 200, "answered Alice,Bob 5 95"),
    "picked up by another phone": ("0 n A Alice; 9 a A 4930299; 60 h A", 100, "answered 4930299 9 51"),
    "outgoing, taken over by a nameless phone": ("0 n A Alice dir=out; 9 a A; 60 n B dir=out to=4930277; 65 a B 4930277; 70 h A; 200 h B", 300, "answered - 9 191"),
    "clock set back an hour in between": ("0 n A Alice; 10 a A Alice; 10.0001 h A", 100, "answered Alice 10 0"),
    # what retention leaves of a call is no missed one
    "newCall removed": ("0 h A cancel; 1 d A 1", DAY, "lost - - -"),
    "all but a digit removed": ("0 d A 1", DAY, "lost - - -"),
    "all but a reply removed": ("0 r A dial", DAY, "lost - - -"),
}


def rows_of(text):
    """Rows of the table `events` for a flow; its times begin at Unix time 1e9."""
    rows, fields = [], {}
    actions = {"voicemail": voicemail(), "dial": dial(MOBILE), "reject": reject("busy"),
               "gather": gather("http://x/y"), "hangup": hang_up()}
    for part in text.split(";"):
        at, kind, leg, *details = part.split()
        more = fields.setdefault(leg, {})
        more.update(detail.split("=") for detail in details if "=" in detail)
        word = next((detail for detail in details if "=" not in detail), "")
        number, orig = 10**15 + round(float(at) * 1e6) + len(rows), more.get("orig", "A")
        if kind == "r":
            rows.append(plain_row(number, "reply", leg, response_xml(actions[word])))
            continue
        direction, xcid = more.get("dir", "in"), more.get("xcid", "ab")
        caller, called = (P, FIRM) if direction == "in" else (FIRM, P)
        event, field = {"n": ("newCall", "user[]"), "h": ("hangup", "cause"), "d": ("dtmf", "dtmf"),
                        "a": ("answer", "answeringNumber" if word.isdigit() else "user")}[kind]
        values = (word or "normalClearing" * (kind == "h")).split(",")
        form = {"event": event, "callId": leg, "origCallId": orig, "xcid": xcid,
                "direction": direction, "from": more.get("from", caller),
                "to": more.get("to", called), field: values}
        links = (None, None) if kind == "d" else (orig if orig != leg else None, xcid)
        rows.append((number, event, leg, *links, urllib.parse.urlencode(form, doseq=True).encode()))
    return rows


def missed_calls(count, step, number, links=""):
    """The flow of so many calls, `step` seconds apart, which nobody answered; from number(n)."""
    return ";".join(
        f"{n * step} n L{n} Alice {links or f'orig=L{n} xcid=x{n}'} from={number(n)};"
        f"{n * step + 20} h L{n} cancel" for n in range(count))


def plain_row(number, event, leg, body):
    return number, event, leg, None, None, body


def fill(database, rows):
    database.execute("BEGIN")
    database.executemany("INSERT INTO events(id, event, call_id, orig_call_id, xcid, body) "
                         "VALUES (?, ?, ?, ?, ?, ?)", rows)
    database.execute("COMMIT")


def call_of(log, leg, now):
    legs = sc.call_with(log, leg)
    return sc.put_together(legs, now) if legs else None


def calls_of(log, now):
    return [call for call, _ in sc.listed_calls(log, now)]


@contextmanager
def environment(**changed):
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(test, server):
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for end in (server.server_close, thread.join, server.shutdown):
        test.addCleanup(end)


class InFolder(WithFolder):
    """Tests of commands, which are run as if the script lay in the folder."""

    def setUp(self):
        super().setUp()
        change(self, sc, "__file__", os.path.join(self.folder, "sipgate_callevents.py"))
        change(self, sys, "stdin", io.StringIO())
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))

    def run_command(self, *arguments, **environ):
        out, err = io.StringIO(), io.StringIO()
        change(self, sys, "argv", ["sipgate_callevents.py", *arguments])
        with environment(**environ), redirect_stdout(out), redirect_stderr(err):
            try:
                status = sc.main()
            except SystemExit as end:
                status = end.code
        return status, out.getvalue(), err.getvalue()

    def assert_refused(self, said, *arguments, status=2, lines=None, **environ):
        found, out, err = self.run_command(*arguments, **environ)
        self.assertEqual((found, out, said in err), (status, "", True), f"{said}: {err}")
        if lines:
            self.assertEqual(len(err.splitlines()), lines, err)

    def start(self, *arguments, **options):
        program = Program(*arguments, **{"folder": self.folder, **options})
        self.addCleanup(program.kill)
        return program


class CallsTest(TestCase):
    def log(self, rows):
        log = sqlite3.connect(":memory:", isolation_level=None)
        self.addCleanup(log.close)
        log.executescript(sc.SCHEMA)
        fill(log, rows)
        return log

    def calls(self, log, now):
        return sorted(calls_of(log, now), key=lambda call: (call.started, call.legs))

    def said(self, log, now):
        """What a person says of the calls, as the flows have it."""
        callers, withheld = sc.to_ring_back(calls_of(log, now))
        self.assertEqual(withheld, 0)
        back = [call for calls in callers for call in calls]
        said = []
        for call in self.calls(log, now):
            wait, talk = ("-" if value is None else f"{round(value, 3):g}"
                          for value in (call.wait_s, call.talk_s))
            by = ",".join(call.answered_by) or "-"
            said.append(f"{call.outcome} {by} {wait} {talk}" + " back" * (call in back))
        return said

    def assert_found(self, log, now):
        for call in calls_of(log, now):
            for leg in call.legs:
                self.assertEqual(call_of(log, leg, now), call)

    def test_each_flow_is_what_a_person_says_of_it(self):
        chance = random.Random(7)
        for name, (text, after, *expected) in FLOWS.items():
            rows, now = rows_of(text), 1e9 + after
            log = self.log(rows)
            self.assertEqual(self.said(log, now), expected, name)
            self.assert_found(log, now)
            calls = self.calls(log, now)
            for call in calls:
                self.assertEqual(list(call.legs), sorted(call.legs), f"{name}, earliest first")
            orders = [chance.sample(rows, len(rows)) for _ in range(60)]
            for order in orders if len(rows) > 5 else itertools.permutations(rows):
                log.execute("DELETE FROM events")
                fill(log, order)
                self.assertEqual(self.calls(log, now), calls, f"{name}, in any order")
            fill(log, [(row[0] + 70, *row[1:]) for row in rows if row[1] != "dtmf"])
            self.assertEqual(self.said(log, now), expected, f"{name}, anything twice")
        self.assertIsNone(call_of(log, "none", 1e9))

    def test_received_in_another_order_a_call_is_the_same(self):
        def found(rows, after):
            call, = calls_of(self.log(rows), 1e9 + after)
            self.assertGreaterEqual(min(call.wait_s or 0, call.talk_s or 0), 0)
            return sorted(call.legs), call.outcome, sorted(call.answered_by), call.from_number

        for name in ("answered", "voicemail", "transfer", "Dial to a mobile", "outgoing",
                     "internal call with two legs"):
            text, after, *_ = FLOWS[name]
            rows = rows_of(text)
            for place in range(len(rows) - 1):
                swapped = list(rows)
                (first, *former), (second, *latter) = rows[place:place + 2]
                swapped[place:place + 2] = (first, *latter), (second, *former)
                if "reply" not in (former[0], latter[0]):
                    self.assertEqual(found(swapped, after), found(rows, after), (name, place))

    def test_random_logs_give_the_same_calls_in_any_order(self):
        chance, now = random.Random(10), 1e9 + 200_000
        known = [row for text, *_ in FLOWS.values() for row in rows_of(text)]
        for _ in range(250):  # many more were compared; here they are to be quick
            chosen = chance.sample(known, chance.randrange(3, 14))
            rows = [(row[0] + 10 * place, *row[1:]) for place, row in enumerate(chosen)]
            log = self.log(rows)
            expected = self.calls(log, now)
            self.assertEqual(sorted(leg for call in expected for leg in call.legs),
                             sorted({row[2] for row in rows}), "each leg once")
            self.assert_found(log, now)
            log.execute("DELETE FROM events")
            fill(log, chance.sample(rows, len(rows)))
            self.assertEqual(self.calls(log, now), expected)

    def test_nobody_joins_strangers(self):
        for links, step in (("orig=L0 xcid=ab", 13 * 3600), ("orig=Z xcid=ab", 3600),
                            ("orig=L19 xcid=cd", DAY), ("orig=Z xcid=", 6 * 3600)):
            office = rows_of(missed_calls(20, step, "49{}".format, links))
            calls = calls_of(self.log(office), 1e9 + 50 * DAY)
            self.assertEqual([len(call.legs) for call in calls], [1] * 20, links)
        rows = [(n, "newCall", "", None, "x", b"direction=in") for n in (1, 2)]
        rows += [(3, "newCall", "L", None, "x", b"direction=in")]
        log = self.log(rows)
        self.assertEqual([call.legs for call in calls_of(log, 1e9)], [("L",), (), ()])
        self.assertIsNone(call_of(log, "", 1e9), "which of those without callId?")
        chain = ";".join(f"{n * 3000} n L{n} Alice orig=L{max(n - 1, 0)}" for n in range(60))
        for call in calls_of(self.log(rows_of(chain)), 1e9 + 50 * DAY):
            numbers = [int(leg[1:]) for leg in call.legs]
            self.assertLess(max(numbers) - min(numbers), 30, "no call is endless")

    def test_odd_logs_hold_up_no_reader(self):
        rows = [(10**15 + n, "newCall", f"L{n}", None, "ab", b"direction=in") for n in range(1500)]
        rows += rows_of("1 n X Alice xcid=zz; 30000 h X cancel")
        rows += [plain_row(10**15 + 2_000_500 + 1000 * n, "dtmf", "X", b"dtmf=1")
                 for n in range(1, 10_000)]
        log = self.log(rows)
        with within(1):
            alone, call = (call_of(log, leg, 1e9 + DAY) for leg in ("L7", "X"))
        self.assertEqual(alone.legs, ("L7",))
        self.assertEqual((call.legs, call.outcome, call.digits[:3]), (("X",), "missed", "1,1"))

    def test_a_month_of_a_small_office_is_read_in_a_second(self):
        month = rows_of(missed_calls(3333, 776, lambda n: f"49157{n % 900}"))
        log, now = self.log(month), 1e9 + 40 * DAY
        with within(3):  # where the machine has something else to do
            callers, _ = sc.to_ring_back(calls_of(log, now))
        self.assertEqual(len(callers), 900)
        with within(0.15):  # the latest cost the same in any log
            self.assertEqual(len(list(itertools.islice(sc.listed_calls(log, now), 20))), 20)


class CallFinderTest(InFolder):
    def setUp(self):
        super().setUp()
        self.log = new_log(self, self.path)
        self.log.record(parse_event(NEW_CALL, ""), time.time(), None)
        self.event = HangupEvent(call_id="123456")
        self.find = partial(sc.find_call, self.path)
        self.assertEqual(self.find(self.event).outcome, "ringing")

    def test_a_call_that_cannot_be_found_in_time_is_none(self):
        self.store(plain_row(n, "dtmf", "123456", "dtmf=1") for n in range(1, 3000))
        change(self, sc, "CALL_SECONDS", 0)
        self.assertIsNone(self.find(self.event))
        self.assertIsNone(sc.find_call(self.path + "none", self.event))

    @on_posix("POSIX locks")
    def test_the_writer_keeps_its_lock_at_a_look_up(self):
        # A file that is opened beside SQLite, and closed, drops the locks of the whole process,
        # which SQLite does not notice while anything of it is connected: then this would succeed.
        switch = ("import sqlite3\n"
                  "sqlite3.connect('calls.db', timeout=0).execute('PRAGMA journal_mode=DELETE')")
        with sc.open_log(self.path) as reader, diagnostics():
            reader.execute("BEGIN IMMEDIATE")
            self.assertIsNone(self.log.record(self.event, 1e9, None))
            reader.execute("COMMIT")
            catch_up(self.log)
            self.find(self.event)
            other = subprocess.run([sys.executable, "-c", switch], capture_output=True, check=False)
            self.assertIn(b"locked", other.stderr)


# ---- Page ----

class PageTest(InFolder):
    def serve(self, port=0):
        settings = Settings(call_log=self.path, webhook_port=port or free_port(),
                            call_page_key="k" * 16)
        self.store(())
        self.server = sc.PageServer(settings, 0)
        self.overview = self.server.overview
        self.server.service_actions = self.overview.look  # every 10 ms
        serve(self, self.server)
        wait_until(lambda: self.overview.version)

    def add(self, text, ago):
        """Store a flow that began so many seconds ago."""
        shift = int((time.time() - ago) * 1e6) - 10**15
        self.store((row[0] + shift, *row[1:]) for row in rows_of(text))

    def get(self, target, method="GET", **headers):
        with http_to(self.server.port) as client:
            client.request(method, target, headers={"Cookie": self.server.cookie, **headers})
            reply = client.getresponse()
            return reply.status, reply.headers, reply.read().decode()

    def data(self, target="/data"):
        return json.loads(self.get(target)[2])

    def calls(self, query=""):
        return self.data("/calls" + query)["calls"]

    def wait_for_open(self, *callers):
        """Wait until the calls that are not over are from those."""
        wait_until(lambda: sorted(call["from"] for call in self.data()["open"]) == [*callers])

    def test_the_key_becomes_a_cookie_and_leaves_the_address(self):
        self.serve()
        status, headers, _ = self.get(f"/?key={self.server.key}", Cookie="")
        self.assertEqual((status, headers["Location"], headers["Set-Cookie"]), (
            303, "/", f"{self.server.cookie}; HttpOnly; SameSite=Strict; Path=/"))
        self.assertNotIn(self.server.key, self.server.cookie)
        with sc.PageServer(self.overview.settings, 0) as again:  # after a restart
            self.assertEqual(again.cookie.split("=")[1], self.server.cookie.split("=")[1])
        status, headers, text = self.get("/")
        self.assertEqual((status, text), (200, sc.PAGE))
        for part in ("Cache-Control: no-store\n", "X-Content-Type-Options: nosniff\n",
                     "Referrer-Policy: no-referrer\n", "default-src 'none'; ",
                     "connect-src 'self'; ", "frame-ancestors 'none'"):
            self.assertIn(part, str(headers))
        for tag in ("style", "script"):
            inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1].encode()
            digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
            self.assertIn(f"{tag}-src 'sha256-{digest}'", headers["Content-Security-Policy"])
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            self.assertNotIn(word, text)

    def test_everybody_else_is_refused(self):
        self.serve()
        cookie = self.server.cookie
        for status, target, *requests in [
                (403, "/", {"Cookie": ""}, {"Origin": "https://evil.example"}, {"Origin": "null"}),
                (403, "/data", {"Cookie": cookie[:-1]}),
                (403, "/?key=wrong", {}), (403, "/?key=", {}),
                (421, "/", {"Host": f"evil.example:{self.server.port}"}, {"Host": ""},
                 {"Host": "127.0.0.1.evil.example"}),
                (200, "/", {"Cookie": f"a=b; {cookie}; c=d"}, {"Host": "localhost:9999"},
                 {"Host": "[::1]:9999", "Origin": "http://[::1]:9999"}, {"method": "HEAD"}),
                (404, "/none", {}), (400, "/data?foo=1", {}), (400, "/calls?count=x", {}),
                (501, "/", {"method": "POST"})]:
            for headers in requests:
                self.assertEqual(self.get(target, **headers)[0], status, f"{target} {headers}")

    def test_it_shows_who_rings_or_talks_and_whom_to_ring_back(self):
        self.add("0 n M Alice orig=M xcid=m; 20 h M cancel", ago=3600)
        self.serve()
        self.assertEqual([(one["from"], one["calls"]) for one in self.data()["back"]], [(P, 1)])
        self.add("0 n A Alice,Bob; 4 a A Bob; 5 n B Carl orig=B xcid=b from=49222", ago=30)
        self.wait_for_open(P, "49222")
        found = self.data()
        self.assertEqual({(call["outcome"], call["from"], *call["answered_by"])
                          for call in found["open"]},
                         {("talking", P, "Bob"), ("ringing", "49222")})
        self.assertEqual(found["back"], [], "Bob speaks with that caller")
        self.assertEqual(found["today"]["calls"] + sum(day[3] for day in found["days"][:-1]), 2)
        self.assertEqual(found["trouble"], "no server runs: calls that come now are not recorded")

    def test_its_figures_are_those_of_incoming_calls(self):
        self.serve()
        self.assertTrue(self.data()["empty"])
        self.add("0 n A Alice; 10 a A Alice; 40 h A; 50 n B Bob orig=B xcid=b; 80 h B cancel; "
                 "90 n C Carl orig=C xcid=c dir=out; 95 a C; 150 h C; 160 h D orig=D xcid=d",
                 ago=200)
        wait_until(lambda: not self.data()["empty"])
        found = sc.counted(call for calls in self.overview.days.values() for call in calls.values())
        self.assertEqual([*map(sum, zip(*found.pop("hours")))], [1, 0, 1])
        self.assertEqual({name: round(value, 1) for name, value in found.items()}, {
            "calls": 2, "missed": 1, "share": 0.5, "wait": 30, "longest": 30, "talk": 30})

    def test_it_follows_the_log_and_only_changes_are_sent(self):
        self.add("0 n A Alice", ago=5)
        self.serve()
        version = self.overview.version
        wait_until(lambda: self.data(f"/data?version={self.overview.version}") == {})
        self.add("0 a A Alice; 1 h A", ago=2)
        wait_until(lambda: self.data(f"/data?version={version}").get("open") == [])
        self.assertEqual([call["outcome"] for call in self.calls()], ["answered"])
        self.run_command("forget", "--yes", P)
        wait_until(lambda: P not in self.get("/data")[2] + self.get("/calls")[2])
        version, trouble = self.overview.version, self.data()["trouble"]
        self.overview._published = (trouble, datetime.date.min)
        wait_until(lambda: self.overview.version != version)  # another day has begun
        names = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "\u202eevil"]
        body = urllib.parse.urlencode({"from": "49222", "user[]": names}, doseq=True).encode()
        self.store([plain_row(int(time.time() * 1e6), "newCall", "", body)])
        self.wait_for_open("49222")
        self.assertEqual(self.data()["open"][0]["users"], [*names[:2], "\\u202eevil"])
        alter(self.path, "DELETE FROM events")  # the log begins anew
        self.wait_for_open()

    def test_calls_are_found_and_opened(self):
        self.add(missed_calls(60, 1, "4917{:02}".format), ago=4000)
        self.add("0 n A Zoe dir=out; 0.1 r A reject; 2 d A 1; 4 h A busy", ago=100)
        self.serve()
        wait_until(lambda: len(self.calls("?count=100")) == 61)
        self.assertEqual((len(self.calls()), self.data("/calls")["more"]), (50, True))
        for query, callers in [("text=%2B491707", ["491707"]), ("direction=out", [FIRM]),
                               ("outcome=missed&count=999", [f"4917{n:02}" for n in range(60)])]:
            self.assertEqual(sorted(call["from"] for call in self.calls("?" + query)), callers)
        self.assertEqual([line[1:3] for line in self.data("/call?key=A")], [
            ["newCall", f"New call from {FIRM} to {P} is ringing..."],
            ["reply", "Reject busy"],
            ["dtmf", f"{FIRM} pressed 1"],
            ["hangup", "The call has been hung up (busy, rejected after 0:04)"]])
        status, headers, text = self.get("/calls.csv")
        self.assertEqual((status, headers["Content-Type"], len(text.splitlines())),
                         (200, "text/csv; charset=utf-8", 62))

    def test_the_running_copy_is_asked_how_it_is(self):
        running = run_server(self)
        self.serve(running.port)
        wait_until(lambda: self.data()["trouble"] == "")
        running.receiver.refused = 2
        wait_until(lambda: "webhooks were refused (2)" in self.data()["trouble"])

    def test_an_unreadable_log_is_told(self):
        empty = sc.Overview(Settings(call_log=self.path, webhook_port=free_port()))
        versions = [(empty.look(), empty.version)[1] for _ in range(2)]
        self.assertEqual(versions[0], versions[1])
        self.serve()
        self.add("0 n A Alice", ago=5)
        self.wait_for_open(P)
        for version, is_other in ((99, True), (sc.SCHEMA_VERSION, False)):
            alter(self.path, f"PRAGMA user_version={version}")
            wait_until(lambda: is_other == (
                "is not a call log of this version" in self.data()["trouble"]))
        os.remove(self.path)
        self.wait_for_open()
        self.assertEqual(self.get("/calls.csv")[0], 503)

    def test_a_call_ends_by_time_alone_and_two_become_one(self):
        self.add("0 n A Alice", ago=3599)
        self.serve()
        self.add("0 n B Bob orig=B xcid=b from=49222; 1 n C Carl orig=C xcid=c from=49333", ago=20)
        wait_until(lambda: len(self.calls()) == 3)
        self.wait_for_open("49222", "49333")
        self.add("0 a C Carl orig=B xcid=b from=49222", ago=10)
        self.wait_for_open("49222")
        self.assertEqual([call["legs"] for call in self.calls()], [["B", "C"], ["A"]])

    def test_a_connection_serves_many_questions_at_once(self):
        self.serve()
        with http_to(self.server.port) as client, within(0.6):  # no 40 ms for each
            for _ in range(20):
                client.request("GET", "/data", headers={"Cookie": self.server.cookie})
                client.getresponse().read()
        with socket.create_connection(("127.0.0.1", self.server.port)) as plain:
            plain.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nCookie: "
                          + self.server.cookie.encode() + b"\r\n\r\n")
            self.assertTrue(all_of(plain).endswith(b"\r\n\r\n"))

    def test_the_command_prints_the_address_and_ends_quietly(self):
        port = free_port()
        program = self.start("page", "--port", str(port), wait=False, CALL_LOG=self.path)
        line = program.stdout.readline().decode()
        self.assertRegex(line, rf"^Open http://127\.0\.0\.1:{port}/\?key=[0-9a-f]{{32}}\n$")
        status, _, err = program.end(signal.SIGINT)
        self.assertEqual((status, err), (130, ""))


# ---- Rehearsal ----

def always(action):
    """Your functions, if they do the same whatever comes."""
    return dict.fromkeys(("on_new_call", "on_dtmf"), lambda event: action)


class RehearsalTest(TestCase):
    ROWS = (  # scenario, decision; of the call: events, by whom, outcome, cause, direction, reply
        ("answered", None, "3 Alice answered in "),
        ("missed", None, "2  missed cancel in "),
        ("busy", None, "2  missed busy in "),
        ("declined", None, "2  missed noAnswer in "),
        ("outgoing", None, "3  answered out "),
        ("voicemail", None, "5  voicemail in "),
        ("transfer", None, "6 Alice,Carl answered in "),
        ("menu", None, "3 Alice answered in "),
        ("menu", gather(), "4  missed in Gather"),
        ("answered", reject("busy"), "2  rejected busy in Reject busy"),
        ("transfer", reject(), "2  rejected noAnswer in Reject"),
        ("answered", hang_up(), "2  rejected in Hangup"),
        ("answered", dial("49211", "492"), "3 49211 answered in Dial 49211 492"),
        ("answered", voicemail(), "3  voicemail in Dial Voicemail"),
        ("answered", play("http://x/a"), "3 Alice answered in Play http://x/a"),
    )

    def rehearse(self, name="answered", digits="1", **functions):
        """What is said, the call that the log holds then, and the events."""
        options = argparse.Namespace(sender="492111234567", to="4915791234567", digits=digits)
        log = new_log(self)
        talk = Conversation(TRIAL, log, partial(sc.find_call, log.path), **functions)
        with redirect_stdout(io.StringIO()) as out:
            sc.rehearse(talk, name, options)
        events = talk.events()
        log.close(5)
        with database_at(log.path) as database:
            call, = calls_of(database, time.time())
        return out.getvalue().splitlines(), call, events

    def test_each_scenario_leaves_the_call_that_your_code_decides(self):
        self.assertEqual({name for name, _, _ in self.ROWS}, set(sc.SCENARIOS))
        for name, action, row in self.ROWS:
            _, call, events = self.rehearse(name, **always(action))
            found = (f"{len(events)} {','.join(call.answered_by)} {call.outcome} {call.cause} "
                     f"{call.direction} {call.reply}")
            self.assertEqual(found.replace("normalClearing ", ""), row, name)

    def test_the_conversation_is_shown_in_both_directions(self):
        self.assertEqual(self.rehearse()[0], [
            "", "answered",
            "--> newCall  New call from 492111234567 to 4915791234567 is ringing...",
            f"<-- {TRIAL_XML.decode().strip()}",
            "--> answer   Alice answered call from 492111234567",
            "<-- This response will be discarded",
            "--> hangup   The call has been hung up (normalClearing)",
            "<-- This response will be discarded"])

    def test_each_leg_answers_for_itself(self):
        first, answer, second, other, *_ = self.rehearse(
            "transfer", on_new_call=lambda event: dial("4921100") if event.first_leg else None)[2]
        self.assertEqual((first.users, first.diversion, answer.answering_number),
                         (("Alice", "Bob"), "", "4921100"))
        self.assertEqual((second.users, second.diversion, other.answering_number),
                         (("Carl",), "4915791234567", "4915791234567"))
        *_, second, first = self.rehearse(
            "transfer", on_new_call=lambda event: None if event.first_leg else reject("busy"))[2]
        self.assertEqual((first.cause, second.cause, second.call.outcome),
                         ("normalClearing", "busy", "answered"))

    def test_a_menu_gets_its_digits_and_obeys_the_last_reply(self):
        def on_dtmf(event):
            return gather(max_digits=4) if event.state == "first" else dial("4921100")

        menu = {"on_new_call": lambda event: gather(state="first"), "on_dtmf": on_dtmf}
        _, call, (_, one, two, *_) = self.rehearse("menu", "19,00421", **menu)
        self.assertEqual((one.dtmf, one.state, two.dtmf, two.state), ("1", "first", "0042", ""))
        self.assertEqual((call.digits, call.outcome, call.answered_by),
                         ("1,0042", "answered", ("4921100",)))
        for functions, digits, line in [
                (menu, "", "--> dtmf     492111234567 pressed [unknown]"),
                (menu, "1,2,7,8", "    (your functions do not ask for 7,8)"),
                ({}, "1", "    (your functions do not ask for 1)")]:
            self.assertIn(line, self.rehearse("menu", digits, **functions)[0])
        self.assertEqual(self.rehearse("menu", "-1", **menu)[2][1].dtmf, "-1")

    def test_what_sipgate_would_not_do_is_named(self):
        sound, digits = "is the sound a WAV file?", "(on_dtmf does nothing with the digits)"
        for action, line, count in [
                (gather(), digits, 1), (gather("http://x/a"), digits, 0),
                (gather("http://localhost:8080/on-data2"), digits, 0),
                (play("http://x/a.mp3"), sound, 1), (play("http://x/a.WAV?b"), sound, 0)]:
            said = self.rehearse(on_new_call=always(action)["on_new_call"])[0]
            self.assertEqual(str(said).count(line), count, said)
        said = self.rehearse("menu", **always(gather("http://x/a")))[0]
        self.assertNotIn("do not ask", str(said), "another server may")
        self.assertNotIn("do not ask", str(self.rehearse("menu", "")[0]))

    def test_code_that_does_not_return_ends_the_rehearsal(self):
        hang = gate(self).wait
        change(self, sc.YourCode, "STUCK_SECONDS", 0.05)
        with self.assertRaisesRegex(sc.CommandEnd, "on_answer has been running"):
            self.rehearse(on_answer=lambda event: hang(10))


# ---- Check ----

class OtherServer(http.server.BaseHTTPRequestHandler):
    """Another program, which says on some paths that it is "me"."""

    def do_GET(self):
        for _ in range(8 * self.path.startswith("/drip")):
            self.wfile.write(b"H")
            Event().wait(0.05)
        says = self.path in ("/new-call", "/on-answer", "/on-hangup", "/evil/healthz")
        self.send_response(200 if self.path == "/healthz" else 503 if says else 404)
        self.send_header("X-Instance", "me" * says)
        self.end_headers()
        self.wfile.write(b"\x1b[31m\r\nok" * says)

    def log_message(self, *args):
        pass


class CheckTest(InFolder):
    def other_server(self):
        server = http.server.HTTPServer(("127.0.0.1", 0), OtherServer)
        serve(self, server)
        return server.server_port

    def assert_finding(self, finding, kind, said):
        self.assertRegex(": ".join(finding), f"^{kind}: {said}")

    def test_the_way_in_is_proven_for_each_path(self):
        server = run_server(self, PATHED)
        here, other = f"127.0.0.1:{server.port}", f"localhost:{self.other_server()}"
        unreached = r".*/new-call does not lead here \("
        for base, asked, kind, said in [
                (f"http://{here}/3f", server.instance, "ok", ".* the running copy, with each of"),
                (f"http://{here}/3f", "me", "problem", unreached + "another copy"),
                (f"http://{here}", server.instance, "problem", unreached + r"status 404\)"),
                (f"http://{other}", "me", "problem", ".*/on-data does not lead here"),
                (f"http://localhost:{free_port()}", "me", "problem", unreached),
                ("http://127.0.0.1..x:1", "me", "problem", unreached),
                (f"https://{other}", "me", "problem", unreached + r"\[SSL")]:
            self.assert_finding(sc._check_way_in(base, asked), kind, said)
        settings = replace(PATHED, webhook_port=server.port)
        self.assertEqual(sc.local_health(settings).instance, server.instance, "/3f/healthz")

    def test_what_a_hostile_server_says_is_escaped(self):
        port = self.other_server()
        out = self.run_command("check", WEBHOOK_URL=f"http://localhost:{port}/evil",
                               WEBHOOK_PORT=str(port))[1]
        self.assertIn(": the running copy says: \\x1b[31m\\r\\nok\nproblem  http", out)

    def test_a_way_in_that_drips_is_not_waited_for(self):
        change(self, sc, "GET_SECONDS", 0.2)
        found = sc._check_way_in(f"http://localhost:{self.other_server()}/drip", "me")
        self.assert_finding(found, "warning", r".*\(timed out\)")  # it may be the router

    def test_certificates_that_sipgate_will_not_accept(self):
        for number, trusted, host, said in [
                (0, "none", "localhost", "self[- ]signed certificate"),
                (1, "both.pem", "localhost", "certificate has expired"),
                (0, "both.pem", "127.0.0.1", "IP address mismatch|not valid for")]:
            path = self.write("both.pem", CERTIFICATES[number])
            port = run_server(self, tls=sc.TlsFiles(path, path)).port
            with environment(SSL_CERT_FILE=trusted):
                found = sc._check_way_in(f"https://{host}:{port}", "me")
            self.assert_finding(found, "problem",
                                f".* does not lead here .*({said}).*valid certificate")
            local = Settings(webhook_port=port, webhook_tls_cert=path)
            self.assertTrue(sc.local_health(local).instance)

    def test_the_port(self):
        running = run_server(self)
        mine = running.port

        def assert_port(port, kind, said):
            settings = Settings(webhook_port=port)
            self.assert_finding(sc._check_port(settings, sc.local_health(settings)), kind,
                                re.escape(f"port {port} of 127.0.0.1: {said}"))

        assert_port(mine, "ok", "the running copy says: ok")
        assert_port(self.other_server(), "problem", "no server with these settings answers (status")
        assert_port(free_port(), "warning", "no server with these settings answers ([")
        running.receiver.refused = 3
        assert_port(mine, "warning", "the running copy says: webhooks were refused (3)")
        running.receiver.health = lambda: "the call log is behind"
        assert_port(mine, "problem", "the running copy says: the call log is behind")

    def assert_log(self, kind, said, path=""):
        self.assert_finding(sc._check_log(path or self.path), kind, "call log:? " + said)

    def test_the_call_log(self):
        for kind, said, path in [
                ("ok", "no calls are", "off"), ("ok", "no calls are", ""),
                ("problem", ".*and this user may not create it$",
                 os.path.join("none", "calls.db")),
                ("problem", f"{self.folder}: unable to open", self.folder)]:
            self.assert_log(kind, said, path)
        self.assertEqual(os.listdir(), [])
        alter(self.path, "CREATE TABLE a(b)")
        self.assert_log("problem", ".* is not a call log of this version")
        os.remove(self.path)
        log = CallLog(self.path, 30)
        self.assert_log("warning", ".* no event yet: are URL and sources set")
        log.record(NewCallEvent(), 1e9, None)
        self.assert_log("ok", ".*calls.db: the last event came on " + sc.local_time(1e9))
        log.close(5)
        damage(self.path)
        self.assert_log("problem", ".*(malformed|not a database|disk image)")


# ---- Serving and the command line: whole programs ----

CALL = sc.Call("in", "492111234567", "4915791234567", ("Alice", "Bob"), ("Alice",), 1e9, 1e9 + 4,
               1e9 + 96.5, 4.0, 92.5, "answered", "normalClearing", "1,0042", "", ("A", "B"))


def finding(**changed):
    """A find_call that finds this call, but for what is changed."""
    return lambda event: replace(CALL, **changed)


class OutputTest(TestCase):
    SENTENCES = (  # event, line
        (AnswerEvent(answering_number="211"), "211 answered call from [unknown]"),
        (AnswerEvent(), "[unknown] answered call from [unknown]"),
        (HangupEvent(), "The call has been hung up"),
        (NewCallEvent(from_number="\x1b[2J\u202e", to_number="a\nb"),
         "New call from \\x1b[2J\\u202e to a\\nb is ringing..."),
        (parse_event(b"event=pause", ""), "Unknown event pause"),
        (HangupEvent(find_call=finding()), "The call has been hung up (talked 1:32)"),
        (HangupEvent(cause="cancel", find_call=finding(outcome="missed", talk_s=None)),
         "The call has been hung up (cancel, missed after 0:04)"),
        (HangupEvent(cause="forwarded", find_call=finding(outcome="missed", ended=None)),
         "The call has been hung up (forwarded)"),
        (DtmfEvent(dtmf="12", find_call=finding(from_number="")), "[unknown] pressed 12"),
    )

    def test_sentences(self):
        for event, line in self.SENTENCES:
            self.assertEqual(sc.event_line(event), line)
        self.assertEqual([sc.duration(seconds) for seconds in (0, 59.9, 3599, 3600, 100_000)],
                         ["0:00", "0:59", "59:59", "1:00:00", "27:46:40"])

    def test_the_time_stands_first_unless_journald_adds_it(self):
        reply = sc.Reply(200, response_xml(reject("busy")), "application/xml")
        replied = sc.Replied(DtmfEvent(dtmf="1"), reply, 1e9, True, reject("busy"))
        for form, with_time, said in [
                ("text", False, "[unknown] pressed 1\nReplied with Reject busy\n"),
                ("text", True, "{0} [unknown] pressed 1\n{0} Replied with Reject busy\n"),
                ("off", True, "")]:
            self.assertEqual(sc.told(replied, form, with_time), said.format(sc.local_time(1e9)))
        with tempfile.TemporaryFile("w") as stream:
            status = os.fstat(stream.fileno())
            for journal, is_this in (("1:2", False), (f"{status.st_dev}:{status.st_ino}", True)):
                with environment(JOURNAL_STREAM=journal):
                    self.assertIs(sc.has_own_time(stream), is_this)

    def test_messages_wrap_and_text_from_outside_stays_one_line(self):
        terminal, out, word = io.StringIO(), io.StringIO(), "one-piece" * 6
        terminal.isatty = lambda: True
        with environment(COLUMNS="40"):
            self.assertEqual(sc.wrapped("ab " * 20 + word, terminal).split("\n"),
                             ["ab " * 12 + "ab", "  " + "ab " * 6 + "ab", "  " + word])
        with sc.diagnostics(out):
            sc.logger.warning("event %s", "\x1b[2J\u202e\nERROR: forged" + " ab" * 50,
                              exc_info=ValueError("a\nERROR: forged"))
        self.assertEqual(out.getvalue(), (
            "WARNING: event \\x1b[2J\\u202e\\nERROR: forged" + " ab" * 50
            + "\n    ValueError: a\n    ERROR: forged\n"))

    def test_a_console_is_a_stream_like_any_other(self):
        print("x", file=sc.Output(None).text)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file, diagnostics() as said:
            output = sc.Output(file)
            console = output.text
            print("a\x1bb\tc", "ü", file=console)
            console.buffer.write(b"raw\n")
            output.put(lambda: "late\x1b\n")
            output.put(lambda: 1 / 0)
            print("last", file=console)
            console.reconfigure(errors="strict")
            self.assertEqual((console.encoding, console.fileno(), console.isatty()),
                             ("utf-8", file.fileno(), False))
            self.assertEqual(output.worker.finish(5), [])
            file.seek(0)
            self.assertEqual(file.read(), "a\\x1bb\tc ü\nraw\nlate\\x1b\nlast\n")
        self.assertIn("not printed", str(said))

    def test_lines_that_nobody_takes_are_dropped_and_counted(self):
        reader, writer = os.pipe()
        with open(reader, encoding="ascii") as taken, open(writer, "w", encoding="ascii") as stream:
            output = sc.Output(stream)
            output.worker.limit = 100
            with diagnostics() as said, ThreadPoolExecutor() as pool:
                for n in range(20_000):
                    print(f"{n:99}", file=output.text)
                lines = pool.submit(list, taken)
                self.assertEqual(output.worker.finish(10), [])
                stream.close()
        self.assertEqual(len(lines.result()) + len(said), 20_000)

    def test_a_table_fits_80_columns_and_uses_more(self):
        long = replace(CALL, answered_by=("Somebody with a very long name indeed", "Bob"))
        hostile = replace(CALL, answered_by=("\x1b[2J" * 30,), from_number="\xad" + "9" * 70)
        for call in (long, hostile):
            line = sc.table([sc.call_row(call)]).splitlines()[1]
            self.assertRegex(line, "^[ -~]{1,80}$")
            self.assertIn(" answered ", line)
        with environment(COLUMNS="200"):
            self.assertTrue(sc.table([sc.call_row(long)]).endswith("name indeed, Bob"))

    def test_json_is_raw_and_csv_is_safe_in_a_spreadsheet(self):
        row = sc.call_row(replace(CALL, from_number="", answered=None))
        text = io.StringIO()
        sc.write_rows([row], "json", text)
        row = json.loads(text.getvalue())
        self.assertEqual([row[name] for name in ("from", "started", "answered", "wait_s", "legs")],
                         [None, "2001-09-09T01:46:40.000Z", None, 4, ["A", "B"]])
        for value in ("492111234567", "=1+1", "+49", "-1", "@a", "123456e0", "1,0042", " =1",
                      "\uff1d1", "20261123"):
            self.assertEqual(sc.readable("user", value, "csv"), "'" + value)
        for name, value, cell in [
                ("user", "\n=1", "\\n=1"), ("users", ("A", "B"), "A, B"), ("user", "Al", "Al"),
                ("calls", 92, 92), ("started", 1e9, sc.local_time(1e9)), ("from", None, ""),
                ("user", "A\rB\x1b[2J\u202e", "A\\rB\\x1b[2J\\u202e")]:
            self.assertEqual(sc.readable(name, value, "csv"), cell)


class Program(subprocess.Popen):
    """The script, running in a folder of its own, and without site-packages: it needs none."""

    def __init__(self, *arguments, folder, script="", wait=True, stdout=subprocess.PIPE, **environ):
        super().__init__(
            [sys.executable, "-S", "-W", "error", script or SCRIPT, *arguments], cwd=folder,
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            env={**os.environ, "WEBHOOK_PORT": "0", "CALL_LOG": "off", "PYTHONIOENCODING": "utf-8",
                 **environ})
        self.said = ""
        while wait and "Ctrl-C stops" not in self.said:
            line = self.stderr.readline().decode()
            self.said += line
            if not line:
                raise AssertionError(f"it ended: {self.said}")
        if wait:
            self.port = int(re.search(r"listens on [^ ]+ port (\d+)", self.said)[1])

    def replies(self, bodies):
        """Send newCalls over one connection; yield replies and how long they took, till it ends."""
        with http_to(self.port) as client, suppress(OSError, http.client.HTTPException):
            for body in bodies:
                began = time.monotonic()
                client.request("POST", "/new-call", body)
                yield client.getresponse().read(), time.monotonic() - began

    def post(self, path="/new-call", body=NEW_CALL, method="POST", **headers):
        with http_to(self.port) as client:
            client.request(method, path, body,
                           {"Content-Type": "application/x-www-form-urlencoded", **headers})
            reply = client.getresponse()
            return reply.status, reply.read().decode()

    def end(self, with_signal=signal.SIGTERM):
        """Stop it; return exit status, stdout, all of stderr."""
        self.send_signal(with_signal)
        out, err = self.communicate(timeout=10)
        return self.returncode, (out or b"").decode(), self.said + err.decode()

    def kill(self):
        super().kill()
        self.communicate()

    def limit(self, name, value, most=-1):
        import resource
        resource.prlimit(self.pid, getattr(resource, name), (value, most))


@on_posix("signals")
class HangingTest(TestCase):
    """With the real time limit, which passes while other tests run."""

    CODE = """\
import sipgate_callevents, time
sipgate_callevents.YourCode.STUCK_SECONDS = 1

class Slow(Exception):
    def __str__(self):
        time.sleep(60)

def on_new_call(event):
    print(event)
    if event.call_id == "slow":
        raise Slow
"""

    @classmethod
    def begin(cls, folder):
        Path(folder, "mine.py").write_text(cls.CODE)
        reader, writer = os.pipe()
        unittest.addModuleCleanup(os.close, reader)
        cls.program = Program(folder=folder, stdout=writer, CALL_HANDLERS="mine.py")
        unittest.addModuleCleanup(cls.program.kill)
        os.close(writer)
        cls.slow, cls.quick = (
            ThreadPoolExecutor(1).submit(list, cls.program.replies(bodies))
            for bodies in ([b"callId=slow", b"callId=1"], [NEW_CALL] * 5000))

    def test_neither_stuck_stdout_nor_hanging_code_delays_a_call(self):
        slow, quick = self.slow.result(30), self.quick.result(30)
        self.assertEqual(len(quick), 5000)
        self.assertLess(max(took for _, took in quick), 2)
        self.assertLess(slow[0][1], 3.2)
        self.assertEqual(len(slow), 2, "nor is its connection lost")
        for reply, _ in slow + quick:
            self.assertTrue(reply.startswith(b"<Response onAnswer="), reply)
        status, _, err = self.program.end()
        self.assertEqual(status, 0)
        self.assertIn("WARNING: your code is stuck: on_new_call has been running", err)
        self.assertRegex(err, r"(?s):\d\d ERROR: on_new_call .*mine.py', line 6, code __str__")


class SettingsFromTest(InFolder):
    def read(self, *arguments, **environ):
        err = io.StringIO()
        with environment(**environ), redirect_stderr(err), sc.diagnostics(err):
            self.options = sc.command_line(arguments)
            found = sc.read_settings(self.options)
        return found, err.getvalue()

    def test_flags_come_before_the_environment_before_the_file(self):
        path = self.write(".env", "WEBHOOK_URL=https://file.example/p\nCALL_OUTPUT=json\n"
                                  "VERIFY_SIGNATURE=off\nCALL_LOG=calls.db\n")
        found, said = self.read("check", "--url", "https://flag.example/q", CALL_OUTPUT="off",
                                VERIFY_SIGNATURE="", WEBHOOK_URL="https://environ.example/r")
        self.assertEqual(self.options.sources, "WEBHOOK_URL (command line), "
                         f"CALL_LOG ({path}), CALL_OUTPUT (environment)")
        self.assertEqual((found.webhook_url, found.call_output, found.verify_signature,
                          found.call_log), ("https://flag.example/q", "off", "on", self.path))
        self.assertEqual(said, f"Settings are read from {path}\n")

    def test_the_port_of_the_page_is_not_that_of_the_webhooks(self):
        for words, port in (("page", 8081), ("page --port 9", 9), ("--port 9 page", 9)):
            self.assertEqual(self.read(*words.split())[0].webhook_port, 8080)
            self.assertEqual(self.options.page_port, port)

    def test_the_file_beside_the_script_comes_before_the_one_here(self):
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
        for name, output in (("elsewhere/.env", "off"), (".env", "json")):
            path = self.write(name, f"CALL_OUTPUT={output}\n")
            found, said = self.read()
            self.assertEqual((found.call_output, found.call_log, said), (
                output, path.replace(".env", "calls.db"), f"Settings are read from {path}\n"))

    def test_a_setting_that_cannot_be_read_ends_the_start(self):
        text = 'A="b\nWEBHOOK_PORT=0\nB=${CALL_LOG}\n'
        for line in ('CALL_OUTPUT="off" x', 'CALL_LOG="', " export CALL_LOG_DAYS"):
            path = self.write("my.env", f"{text}{line}\n")
            self.assert_refused(f"{path} line 4 cannot be read: ", "--env-file", path, lines=3)
        self.write("my.env", text)
        self.assertRegex(self.read("--env-file", "my.env")[1],
                         "line 1 cannot be read: expected NAME=value.*; it is skipped\n")

    def test_a_name_that_is_no_setting_is_taken_for_a_slip(self):
        self.write(".env", "VERIFY_SIGNTURE=off\nwebhookurl=x\n")
        said = self.read(WEBHOOK_PROT="1")[1]
        for name in ("VERIFY_SIGNTURE; is VERIFY_SIGNATURE meant?",
                     "webhookurl; is WEBHOOK_URL meant?", "WEBHOOK_PROT; is WEBHOOK_PORT meant?"):
            self.assertIn(f"nothing uses {name}\n", said)

    FILES = (  # setting, what the file holds that it names, what is said
        ("CALL_HANDLERS", "def on_new_call(event):\n    retrun None\n", "(it, line 2)"),
        ("CALL_HANDLERS", "\n\nimport sys\nsys.exit('no')\n", 'it": line 4: SystemExit: no'),
        ("CALL_HANDLERS", "def decide(event): 0\n", "expected on_new_call, on_answer, on_hangup"),
        ("CALL_HANDLERS", "def on_answer(): pass\ndef on_dtmf(event): pass\n",
         "plain functions of one argument"),
        ("CALL_HANDLERS", "async def on_hangup(event): pass\n", "without async"),
        ("WEBHOOK_TLS_CERT", "text", "expected a PEM certificate"),
        ("WEBHOOK_TLS_KEY", "text", "expected a PEM certificate"),
        ("--env-file", "a=b".encode("utf-16"), "save it as UTF-8 (PowerShell's > writes UTF-16)"),
        ("--env-file", b"A=b\nB=\xe4\n", "save it as UTF-8"),
    )

    WRONG = (  # setting, values, what is said
        ("CALL_HANDLERS", "none", 'none": FileNotFoundError: [Errno 2] No'),
        ("SIGNATURE_KEY_FILE", "none", "expected a PEM file"),
        ("CALL_LOG", "none/calls.db", "expected a file in a folder that this user may"),
        ("--env-file", "none", "cannot be read: No such file"),
        ("WEBHOOK_HOST", "192.0.2.1 127.0.0.1:80 a..b", "set WEBHOOK_HOST to"),
    )

    def test_a_start_that_cannot_be_says_why_in_one_line(self):
        files = ((name, self.write("it", text), said) for name, text, said in self.FILES)
        for name, values, said in itertools.chain(files, self.WRONG):
            for value in values.split():
                environ = {"WEBHOOK_URL": "https://x.example/p", "WEBHOOK_PORT": "0", name: value}
                arguments = (name, environ.pop(name)) if name == "--env-file" else ()
                self.assert_refused(said, *arguments, lines=1, **environ,
                                    status=1 if name == "WEBHOOK_HOST" else 2)


@on_posix("signals")
class ProgramTest(InFolder):
    def assert_ended(self, program, *said):
        """It can be told to end, and has said all that."""
        status, out, err = program.end()
        self.assertEqual(status, 0, err)
        for part in said:
            self.assertIn(part, err)
        return out

    def test_the_documented_examples_in_an_empty_folder(self):
        program = self.start(CALL_LOG=self.path, CALL_LOG_DAYS="7")
        expected = TRIAL_XML.decode().replace("8080", str(program.port))
        discarded = DISCARDED.decode()
        for path, body, reply in [
                ("/new-call", NEW_CALL, expected), ("/on-data", DTMF, expected),
                ("/on-answer", ANSWER, discarded), ("/on-hangup", HANGUP, discarded),
                ("/new-call", b"", expected)]:
            self.assertEqual(program.post(path, body), (200, reply))
        status, out, err = program.end(signal.SIGINT)
        self.assertEqual(status, 0)
        self.assertEqual(re.subn(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", out), (
            "New call from 492111234567 to 4915791234567 is ringing...\n"
            "492111234567 pressed 1\nJohn Doe answered call from 492111234567\n"
            "The call has been hung up (normalClearing, talked 0:00)\n"
            "New call from [unknown] to [unknown] is ringing...\n", 5))
        self.assertIn("ssh -R 80:127.0.0.1:", err)
        self.assertIn(f"CALL_LOG is {self.path}\nCALL_LOG_DAYS is 7\n", err)
        self.assertLessEqual(max(map(len, err.replace(self.folder, "").splitlines())), 80)

    CODE = """\
import logging.config, sys
from sipgate_callevents import NewCallEvent, dial

def onAnswer(event):
    pass

def on_hangup(event):
    print("it was", event.call.outcome)
    logging.config.dictConfig({"version": 1})
    sys.stdout = sys.stderr = None
    1 / 0

def on_new_call(event):
    assert isinstance(event, NewCallEvent)
    print("deciding\\33ü", event.from_number)
    return dial("4921100")
"""

    def test_a_signed_call_with_a_key_and_functions_of_ones_own(self):
        self.write("key.pem", TEST_KEY_PEM)
        path = self.write("mine.py", self.CODE)
        env = self.write("my.env", "WEBHOOK_URL=https://x.example/p\nSIGNATURE_KEY_FILE=key.pem\n"
                         "CALL_HANDLERS=mine.py\nCALL_OUTPUT=json\n")
        os.mkdir("elsewhere")
        renamed = self.write("elsewhere/phone.py", text_of("sipgate_callevents.py"))
        program = self.start("--env-file", env, folder="elsewhere", script=renamed,
                             CALL_LOG=self.path)

        def signed(path, body):
            return program.post(path, body, **{"X-Sipgate-Signature": sign(body)})

        status, xml = signed("/p/new-call", NEW_CALL + b"&mood=a&mood=b&received_at=0")
        self.assertEqual((status, ET.fromstring(xml).find("Dial/Number").text), (200, "4921100"))
        self.assertEqual(program.post("/p/on-hangup", HANGUP)[0], 403)
        os.utime(path, (1, 1))
        self.assertEqual(signed("/p/on-hangup", HANGUP)[0], 200)
        out = self.assert_ended(
            program, "Webhooks > URLs", "https://x.example/p/new-call\n",
            "deciding\\x1bü 492111234567", "it was missed", "VERIFY_SIGNATURE is on\n",
            "signature missing", "on_hangup raised Zero",
            "mine.py has changed: restart this program to use it",
            "nothing uses onAnswer; is on_answer meant?")
        first, second = map(json.loads, out.splitlines())
        self.assertRegex(first.pop("received_at"), r"^2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual(first, {
            "event": "newCall", "from": "492111234567", "to": "4915791234567", "direction": "in",
            "callId": "123456", "user": ["Alice", "Bob"], "userId": ["w0", "w1"],
            "fullUserId": ["1234567w0", "1234567w1"], "mood": ["a", "b"], "reply": "Dial 4921100"})
        self.assertEqual((second["event"], "reply" in second), ("hangup", False))

    def test_no_acknowledged_event_is_missing_after_kill_9(self):
        acknowledged = []

        def load(program, prefix):
            sent = (f"callId={prefix}-{n}" for n in itertools.count())
            for n, _ in enumerate(program.replies(sent)):
                acknowledged.append(f"{prefix}-{n}")

        for turn in range(3):
            before = len(acknowledged)
            with within(1.5):
                program = self.start(CALL_LOG=self.path)
                self.assertEqual(program.post(body=b"callId=start")[0], 200)
            with ThreadPoolExecutor(4) as pool:
                for n in range(4):
                    pool.submit(load, program, f"{turn}-{n}")
                wait_until(lambda before=before: len(acknowledged) > before + 100)
                program.kill()
        self.start(CALL_LOG=self.path)
        self.assertEqual(set(acknowledged) - set(stored(self.path)), set())

    @on_linux
    def test_a_full_disk_delays_no_call_and_loses_no_event(self):
        program, sent, status = self.start(CALL_LOG=self.path), [], 200
        program.limit("RLIMIT_FSIZE", 1_000_000)
        while status == 200:
            with within(1.5):
                sent.append(f"call{len(sent)}")
                body = f"callId={sent[-1]}&a=".encode() + b"b" * 60_000
                self.assertEqual(program.post(body=body)[0], 200)
            self.assertLess(len(sent), 100)
            status, said = program.post("/healthz", None, "GET")
        self.assertEqual(said, "the call log is behind\n", "strangers are not told where it is")
        sent.append("last")
        program.post(body=b"callId=last")
        program.limit("RLIMIT_FSIZE", -1)
        self.assert_ended(program, "the call log is behind (")
        self.assertEqual(stored(self.path), sent)

    @on_linux
    def test_used_up_memory_or_file_descriptors_are_no_end(self):
        program, other = self.start(), self.start()
        pages = Path(f"/proc/{program.pid}/statm").read_text().split()[0]
        size = int(pages) * os.sysconf("SC_PAGE_SIZE")
        program.limit("RLIMIT_AS", size + 2_000_000)  # not one more thread's stack
        with socket.create_connection(("127.0.0.1", program.port), 10) as connection, \
                within(5), suppress(OSError):
            connection.recv(1)
        program.limit("RLIMIT_AS", -1)
        other.limit("RLIMIT_NOFILE", 30, 30)
        for _ in range(36):
            self.addCleanup(socket.create_connection(("127.0.0.1", other.port), 10).close)
        for server, said in ((program, "can't start new thread"), (other, "[Errno 24] Too many")):
            with within(5):
                self.assertEqual(server.post()[0], 200)
            self.assert_ended(server, "a connection could not be accepted: " + said)

    def test_a_port_in_use_ends_the_start_and_nohup_means_it(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, before)
        first = self.start()
        for command in ((), ("page",)):
            self.assert_refused(f"port {first.port}: Address already in use", *command,
                                "--port", str(first.port), lines=1, status=1)
        first.send_signal(signal.SIGHUP)
        self.assertEqual(first.post()[0], 200)
        self.assert_ended(first, "CALL_LOG is off\n")

    def test_part_one_serves_with_part_two_cut_off(self):
        part_one = text_of("sipgate_callevents.py").partition("# PART II")[0]
        path = self.write("part_one.py", part_one + """
sys.exit(serve(Settings(webhook_port=0, call_log="off"), announce=lambda settings:
    f"listens on x port {settings.webhook_port} Ctrl-C stops\\n"))
""")
        program = self.start(script=path)
        for path, body in (("/new-call", NEW_CALL), ("/on-hangup", HANGUP)):
            self.assertEqual(program.post(path, body)[0], 200)
        self.assert_ended(program)

    def test_importing_does_nothing(self):
        look = "import threading, sipgate_callevents; print(threading.active_count())"
        out = subprocess.check_output([sys.executable, "-W", "error", "-c", look], cwd=HERE,
                                      stderr=subprocess.STDOUT)
        self.assertEqual(out, b"1\n")


class CommandTest(InFolder):
    def fill_log(self, *numbers):
        """25 missed calls of three callers, one of them withheld."""
        numbers = numbers or ("49157111222", "", "49222333444") * 2
        self.store(rows_of(missed_calls(25, 500, lambda n: numbers[n % 6])))

    def calls(self, *arguments):
        return self.run_command("calls", *arguments)[1].splitlines()

    def entries(self, *arguments):
        return [json.loads(line) for line in self.calls("--format", "json", *arguments)]

    def test_calls_in_each_form(self):
        self.assert_refused(f"no calls are kept yet (CALL_LOG={self.path})\n", "calls", status=0)
        self.assertEqual(os.listdir(), [])
        self.fill_log()
        for limit, count, last in [
                ((), 22, "These are the latest 20; --limit N shows more."),
                (("--limit", "25"), 26, f"{sc.local_time(1e9 + 12_000)[5:16]} in "
                 "+49157111222 +4930200 missed  0:20")]:
            lines = self.calls(*limit)
            self.assertEqual((len(lines), lines[-1]), (count, last))
        head = ("direction,from,to,users,answered_by,started,answered,ended,wait_s,talk_s,outcome,"
                "cause,digits,reply,legs")
        times = f"{sc.local_time(1e9 + 12_000)},,{sc.local_time(1e9 + 12_020)}"
        line = f"in,'49157111222,'4930200,Alice,,{times},20,,missed,cancel,,,L24"
        for form, limit, count, first in [
                ("csv", "3", 4, [head, line]),
                ("excel", "99", 26, ["\ufeff" + head.replace(",", ";"), line.replace(",", ";")]),
                ("json", "99", 25, [])]:
            lines = self.calls("--format", form, "--limit", limit)
            self.assertEqual((len(lines), lines[:len(first)]), (count, first))

    def test_calls_are_found_by_number_and_date_with_events(self):
        self.fill_log()
        log = CallLog(self.path, 30)
        for n, body in enumerate((NEW_CALL, DTMF, ANSWER, HANGUP)):
            log.record(parse_event(body, ""), time.time() - 60 + 4 * n, None)
        log.close(5)
        self.store(rows_of(f"50000 n A Alice; 50004 a A {MOBILE}; 50060 h A"))
        for number, count in ((MOBILE, 1), (P, 1), ("49171*", 1), ("4917", 0),
                              ("+49.157 (111) 222", 9)):
            self.assertEqual(len(self.entries("--number", number)), count, number)
        for second, count in ((50000, 2), (50001, 1)):  # by when they began, not by their end
            since = sc.local_time(1e9 + second)
            self.assertEqual(len(self.entries("--since", since)), count)
        entry, = self.entries("--since", "2026-01-01", "--events")
        self.assertEqual((entry["from"], entry["users"], entry["digits"]),
                         ("492111234567", ["Alice", "Bob"], "1"))
        self.assertEqual([event["event"] for event in entry["events"]],
                         ["newCall", "dtmf", "answer", "hangup"])
        self.assertRegex("\n".join(self.calls("--number", "4921*", "--events")), (
            r"\ASTARTED .*\n\d\d-\d\d \d\d:\d\d in \+492111234567 \+4915791234567 answered 0:08 "
            r"0:04 John Doe\n  \d\d:\d\d:\d\d newCall New call from 492111234567 to .*\n"
            r"(  \d\d:\d\d:\d\d \w+ +.*\n){2}  .* hangup  .* \(normalClearing, talked 0:04\)\Z"))

    def test_whom_to_ring_back_is_one_line_a_caller(self):
        self.fill_log("49157111222", "anonymous", "0049222333444",
                      "+49157111222", "[forgotten]", "49222333444")
        times = [sc.local_time(1e9 + second) for second in (12_000, 11_500)]
        self.assertEqual(self.calls("--missed"), [
            "STARTED        FROM         TO       TIMES OUTCOME WAIT TALK BY",
            f"{times[1][5:16]} in +49222333444 +4930200 8     missed  0:20",
            f"{times[0][5:16]} in +49157111222 +4930200 9     missed  0:20",
            "and 8 with no number"])
        self.assertEqual([entry["from"] for entry in self.entries("--missed")],
                         ["49157111222", "49222333444"])
        self.assertRegex(self.calls("--missed", "--format", "csv")[1],
                         f"^in,'49157111222,'4930200,Alice,,{times[0]},.*,missed,.*,9$")
        self.assertEqual(len(self.entries("--missed", "--all")), 17)
        latest = self.entries("--missed", "--all", "--limit", "3", "--events")
        self.assertEqual([(entry["legs"], len(entry["events"])) for entry in latest],
                         [(["L24"], 2), (["L23"], 2), (["L21"], 2)])
        self.assertEqual(self.calls("--missed", "--since", "2026-01-01"), ["no call matches"])
        self.store(rows_of(f"13000 n A; 13009 h A forwarded; 13009 n B to={MOBILE}; 13020 h B"))
        self.assertEqual(len(self.entries("--missed", "--number", MOBILE)), 1)

    CODE = """\
from sipgate_callevents import dial, threading

def on_new_call(event):
    return dial("4921100")

def on_answer(event):
    threading.Event().wait(0.05)
    print("hello")
"""

    def test_a_rehearsal_from_an_empty_folder(self):
        path = self.write("mine.py", self.CODE)
        status, out, err = self.run_command("simulate", "--all", CALL_HANDLERS="mine.py")
        self.assertEqual((status, err), (0, ""))
        for part in (path, " +4915791234567 answered 0:00 0:00 +4921100\n",
                     "discarded\nhello\n--> hangup"):
            self.assertIn(part, out)
        self.assertEqual(set(os.listdir()) - {"__pycache__"}, {"mine.py"})
        self.write("mine.py", "def on_new_call(event): return '<Dial/>'")
        status, _, err = self.run_command("simulate", "missed", CALL_HANDLERS="mine.py")
        self.assertEqual(status, 1)
        self.assertIn("on_new_call returned a str, not an action", err)

    def test_a_sound_that_sipgate_would_skip_is_named(self):
        path = self.write("a.wav", "ID3 mp3")
        self.assertIn("not a PCM WAV", self.run_command("simulate", "--sound", path)[1])
        for *form, said in [
                (1, 2, 8000, "sipgate plays it"), (2, 2, 8000, "2 channels, 2 bytes a sample, 8"),
                (1, 1, 8000, "1 channels, 1 bytes a "), (1, 2, 44100, "a sample, 44100 Hz")]:
            with wave.open(path, "wb") as sound:
                sound.setparams((*form, 0, "NONE", ""))
            status, out, _ = self.run_command("simulate", "--sound", path)
            self.assertEqual((status, said in out), (said != "sipgate plays it", True), out)

    WRONG = (  # command line, what is said
        ("--prot 8081", "there is no --prot\n"),
        ("--port x", 'argument --port: "x": expected a whole number from 0 to 65535'),
        ("check --url x", 'argument --url: "x": expected an address'),
        ("call --missed", "there is no call\n"),
        ("simulate mised", "invalid choice: 'mised'"),
        ("calls --limt 3", "unrecognized arguments: --limt 3"),
        ("calls --since yesterday", "expected a date such as 2026-11-01"),
        ("calls --limit 0", 'argument --limit: "0": expected a whole number from 1 to 99999'),
        ("forget Alice", "expected a complete number"),
        ("forget 12*", "expected a complete number"),
    )

    def test_wrong_words_are_named(self):
        for text, said in self.WRONG:
            self.assert_refused(said, *text.split())
        for argument, said in [("--version", "2."), ("-h", "--env-file ENV_FILE")]:
            self.assertIn(said, self.run_command(argument)[1])

    def test_check_names_every_slip(self):
        self.assert_refused("WEBHOOK_URL", "check", WEBHOOK_URL="x", VERIFY_SIGNATURE="x", lines=2)
        right = self.write("right.py", "def on_hangup(event): pass\n")
        wrong = self.write("wrong.py", "def on_new_call(): pass\n")
        port = str(run_server(self).port)
        for environ, kinds, said in [
                ({}, "ok ok ok ok warning", "without WEBHOOK_URL sipgate"),
                ({"CALL_HANDLERS": right}, "ok ok ok ok warning", f"your functions: {right}"),
                ({"CALL_HANDLERS": wrong}, "ok problem ok ok warning", "expected on_new_call, "),
                ({"WEBHOOK_URL": "http://x.example", "SIGNATURE_KEY_FILE": wrong,
                  "WEBHOOK_PORT": str(free_port())}, "ok warning warning problem ok warning",
                 "settings: WEBHOOK_URL (environment), WEBHOOK_PORT (environment), SIG")]:
            status, out, _ = self.run_command("check", **{"WEBHOOK_PORT": port, **environ})
            self.assertEqual((" ".join(re.findall("(?m)^[a-z]+", out)), status, said in out),
                             (kinds, "problem" in kinds, True), out)


class ForgetTest(InFolder):
    HIDDEN = (  # bodies; what stands between bars is blanked
        *(f"x=1&a=|{hidden}|" for hidden in (
            "49157999111", "%2B49157999111", "0049157999111", "sip%3A49157999111%40host",
            "cause%2049157999111", "tel%3A%2B49-157-999111", "49.157.999.111",
            "49157999111%2049222", "%C3%BC%2849157999111%29")),
        "from=|%2B49+(0)157_999111|", "<x=1&from=|49157999111|", "a=|b=49157999111|&c",
        *("user[]=A&user[]=B&from=" + other for other in (
            "491579991112", "149157999111", "4915799911", "77491579991110")),
        '<Response onHangup="|https://x/49157999111/h|"><Dial><Number>|49157999111|</Number>'
        "<Number>49157999112</Number></Dial></Response>\n",
        '<Response><Gather onData="|http://x/d?state=%7B%22n%22%3A+%2249157999111%22%7D|" '
        'maxDigits="1" timeout="2000" /></Response>\n',
    )

    def forget(self, *words):
        return self.run_command("forget", *words)

    def test_no_byte_of_a_forgotten_number_is_left(self):
        blanked = [re.sub(r"\|[^|]*\|", "[forgotten]", text).encode() for text in self.HIDDEN]
        rows = [("newCall", f"leg{n}", b"direction=in&from=49211%d" % n) for n in range(3000)]
        rows += [("reply" if text.startswith("<R") else "newCall", f"x{n}",
                  text.replace("|", "").encode()) for n, text in enumerate(self.HIDDEN)]
        rows += [("49157999111", "x", b"event=49157999111"),
                 ("newCall", "49157999111", b"callId=49157999111&origCallId=49157999111"),
                 ("hangup", "49157999111", b"event=hangup")]
        now = int(time.time() * 1e6) - 3600 * 10**6
        self.store(plain_row(now + n, *row) for n, row in enumerate(rows))
        self.write("calls.db.damaged-1", "...49157999111...")
        self.write("calls.db.damaged-2", "...")
        self.assert_refused("no call holds 057999111; with the country code? 1491",
                            "forget", "057999111", "--yes", status=1)
        moment = "[-0-9]{10} [0-9:]{5}"
        for text in ("0049157999111", "+49 (0) 157/999-111", "49.157.999.111", "tel:+49157999111",
                     "sip:49157999111@sipgate.de"):
            status, out, _ = self.forget(text)
            self.assertEqual(status, 1, "nobody said yes")
            self.assertRegex(out, rf"^49157999111 is in 16 calls, from {moment} to {moment}\.\n")
        log = CallLog(self.path, 30)  # as of a running server, whose -wal is not emptied by closing
        status, out, err = self.forget("--yes", "+49 (157) 999-111")
        log.close(5)
        self.assertEqual((status, err), (0, ""))
        self.assertIn(f"It is gone from {self.path}. ", out)
        self.assertLessEqual(max(map(len, out.replace(self.folder, "").splitlines())), 80)
        self.assertEqual(sorted(os.listdir()), ["calls.db", "calls.db.damaged-2"])
        found = stored(self.path, "call_id, body")
        self.assertEqual([body for _, body in found[3000:-2]], [*blanked, b"event=[forgotten]"])
        (token, body), (other, _) = found[-2:]
        self.assertEqual(other, token, "still one call")
        self.assertRegex(token, r"^\[forgotten [0-9a-f]{8}\]$")
        self.assertEqual(parse_event(body, "newCall").call_id, "[forgotten]")
        self.assertIsNone(re.search(rb"(?<![0-9])49157999111(?![0-9])",
                                    Path(self.path).read_bytes()))
        self.assertEqual(self.forget("49157999111")[0], 1)
        self.assertEqual([sc.described(body) for body in blanked[-2:]],
                         ["Dial [forgotten] 49157999112", "Gather"])

    def test_it_is_gone_only_once_no_byte_of_it_is_left(self):
        self.store(plain_row(n, "newCall", "x", b"from=49157999111") for n in range(99))
        alter(self.path, "PRAGMA secure_delete=OFF; DELETE FROM events WHERE id > 1;"
                         "UPDATE events SET digest = id")
        rewrite = sc.rewrite
        change(self, sc, "rewrite", lambda *_: None)
        status, _, err = self.forget("49157999111", "--yes")
        self.assertEqual((status, stored(self.path, "digest")), (1, [None, None]))
        self.assertIn(f"49157999111 is still in {self.path}: end ", err)
        sc.rewrite = rewrite
        self.assertEqual(self.forget("49157999111", "--yes")[0], 0)


# ---- The README and the other files ----

def text_of(name):
    path = Path(HERE, name)
    return path.read_text("utf-8") if path.exists() else ""


@unittest.skipUnless(text_of("README.md") and text_of(".env.example"),
                     "only where they lie beside this file")
class ReadmeTest(TestCase):
    README = text_of("README.md")
    CODE = tuple(re.findall(r"```python\n(.*?)```", README, re.DOTALL))

    def test_its_table_and_the_example_file_name_all_settings(self):
        table = re.findall(r"^\| `([A-Z_]+)`[^|]*\| ([^|]*?) ?\|", self.README, re.MULTILINE)
        script = [(setting.name.upper(), str(setting.default)) for setting in sc.fields(Settings)]
        self.assertEqual(table, script)
        lines = text_of(".env.example").splitlines()
        self.assertEqual([tuple(line.split("=")) for line in lines[1::2]], script)
        for comment in lines[::2]:
            self.assertRegex(comment, "^# [^#]+$")
        self.assertEqual(sc.read_env_file(os.path.join(HERE, ".env.example")), dict(script))

    def functions(self, number):
        mine = {"__file__": os.path.join(HERE, "mine.py")}
        exec(self.CODE[number], mine)
        return mine

    def test_its_functions_do_what_they_are_there_for(self):
        self.assertEqual(len(self.CODE), 5)
        decide, incoming = self.functions(0)["on_new_call"], NewCallEvent(direction="in")
        self.assertEqual(decide(NewCallEvent(from_number="anonymous")), reject("busy"))
        self.assertEqual(decide(incoming), voicemail())
        self.assertIsNone(decide(replace(incoming, users=("Alice",))))
        mine = self.functions(1)
        decide, on_dtmf = mine["on_new_call"], mine["on_dtmf"]
        self.assertIn(b"/x/on-data?state=menu", response_xml(decide(incoming), "http://x"))
        self.assertIsNone(decide(replace(incoming, call_id="B", orig_call_id="A")))
        self.assertEqual(on_dtmf(DtmfEvent(dtmf="1", state="menu")),
                         dial("4915799912345", "492111234567"))
        self.assertEqual(on_dtmf(DtmfEvent(state="menu")), voicemail())

    def test_its_recipe_for_mail_sends_one(self):
        def take():
            client, _ = listener.accept()
            with client, client.makefile("rwb", 0) as stream:
                for status in (220, 250, 250, 250, 354, 250, 221):
                    stream.write(b"%d x\r\n" % status)
                return list(stream)

        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
            received = pool.submit(take)
            change(self, smtplib.SMTP, "default_port", listener.getsockname()[1])
            for outcome in ("missed", "answered"):
                self.functions(2)["on_hangup"](HangupEvent(find_call=finding(outcome=outcome)))
            self.assertIn(b"Subject: Missed call from 492111234567\r\n", received.result(10))

    def test_its_recipe_for_office_hours_and_a_block_list(self):
        decide, incoming = self.functions(3)["on_new_call"], NewCallEvent(direction="in")
        path = Path(temporary_folder(self), "blocked.txt")
        for hour, action in ((8, voicemail()), (9, None), (16, None), (17, voicemail())):
            at = datetime.datetime(2026, 11, 26, hour, 30)
            self.assertEqual(decide(incoming, lambda at=at: at, path), action)
        path.write_text("49111\n49222\n")
        self.assertEqual(decide(NewCallEvent(from_number="49222"), blocked=path), reject())

    def test_its_recipe_passes_an_event_on_as_it_came(self):
        running = run_server(self, LIVE)
        url = f"http://127.0.0.1:{running.port}/on-hangup"
        self.functions(4)["on_hangup"](parse_event(HANGUP, "", signature=sign(HANGUP)), url)
        wait_until(lambda: running.shown)
        self.assertEqual([event.body for event in running.shown], [HANGUP])

    def test_its_tables_and_its_licence_are_those_of_the_script(self):
        for action in (dial, voicemail, play, gather, reject, hang_up):
            plain = re.sub(": '[^']*'| -> .*", "", str(inspect.signature(action)))
            self.assertIn(f"\n| `{action.__name__}{plain.replace(' = ', '=')}`",
                          self.README.replace('"', "'"))
        self.assertIn(f"The scenarios: {', '.join(sc.SCENARIOS)}.", self.README)
        self.assertIn("SPDX-License-Identifier: Unlicense", text_of("sipgate_callevents.py"))
        self.assertTrue(self.README.rstrip().endswith("please refer to <https://unlicense.org/>"))


if __name__ == "__main__":
    unittest.main()
