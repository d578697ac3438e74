"""Tests of sipgate_callevents.py: python3 -m unittest

In the order of its sections. Plain functions are called; what only exists on a connection
(status codes, headers, limits) is tried over loopback, and whole programs are started where
start and stop matter. Nothing is mocked, no port is fixed.
"""
import argparse
import base64
import contextlib
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import wave
import xml.etree.ElementTree as ET
from dataclasses import replace

import sipgate_callevents as sc
from sipgate_callevents import (
    AnswerEvent,
    CallFunctions,
    CallLog,
    DtmfEvent,
    HangupEvent,
    NewCallEvent,
    PublicKey,
    Receiver,
    Settings,
    SettingsError,
    UnknownEvent,
    WebhookError,
    WebhookRequestHandler,
    WebhookServer,
    dial,
    gather,
    hang_up,
    is_signed,
    parse_dotenv,
    parse_event,
    parse_head,
    play,
    reject,
    response_xml,
    voicemail,
)

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "sipgate_callevents.py")

# The examples of sipgate's documentation, as its curl commands send them.
NEW_CALL = (b"event=newCall&from=492111234567&to=4915791234567&direction=in&callId=123456&user[]=Alice&user[]=Bob"
            b"&userId[]=w0&userId[]=w1&fullUserId[]=1234567w0&fullUserId[]=1234567w1")
ANSWER = (b"event=answer&callId=123456&user=John+Doe&userId=w0&fullUserId=1234567w0&from=492111234567"
          b"&to=4915791234567&direction=in&answeringNumber=21199999999")
HANGUP = (b"event=hangup&cause=normalClearing&callId=123456&from=492111234567&to=4915791234567&direction=in"
          b"&answeringNumber=4921199999999")
DTMF = b"event=dtmf&dtmf=1&callId=123456"

# A key made for these tests alone; the exponent that signs stands below it.
TEST_KEY_PEM = """\
-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAtHd3nxfjrfcnNEYVpQia
tBY9lrY0lhtsfPsQVsiieNsv4luWVP1KJCl802zx9UE3XD2KVuybQMSlj4pJgFon
f/G8bjBiEQj865Z/GIiJZiBbZPyyahe5vg1RaamZ/zyxwCeYN4glo2A6BV4jT0+X
4KhySj//rgkWGISMkPSLXbbUvv2YzkNMmnKqVxc+muq8PwV6K8wadhCXDNVNCf3t
zYRAzGWl3HSs5mkX3rZa+jOT+NerD9MxhcNmfBpgsBHVSUovpEKm/Xv7voTF3kJs
mn2aR1TT/Tydh9XZpyk4KrWyqlKZQP0l9IVAfvzNeDY5Lxbcfnr3W8ZiOesooVGn
DQIDAQAB
-----END PUBLIC KEY-----
"""
TEST_KEY = PublicKey.from_pem(TEST_KEY_PEM)
TEST_KEY_SECRET = int(
    "28dacce15ee2a3cd0a7a8a8d36ddd24c07a6ecba16008f77c9797af2f29bd9796187408db172dff87ccdedfd416f70d2ac16"
    "a07d5a36317cf3302231ce955a50dc3478cb8a3fea057bfe078ad1ca2d2d1113b5235ce23f21f7d8e0ef4cd61bf2ef99e71b"
    "573e9214643e37d80d89eacba8c6aae97f23f299a676476e3f765781fd7d1c3b30d92c6182aab41249d846fc01c6416899f6"
    "d4502b18f3787c4860f283451260f0a644dba8f1ab7185d324ecfe88ace35699b0d39e0b5a9b608bad241356c71f18530f85"
    "df30c4d8460094fc9b68ddae4561fe763293f0facd31d7a911c77ec44c460a0ed6e2b88eae899dcbf8bc21184ae35d5f4874"
    "6f0d850f7f0f", 16)


# Certificates for localhost with their keys, made for these tests alone: two for 100 years, one expired.
CERTIFICATES = (("""\
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUbgfYovY85lXaNCYBfiK471zT2SgwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzE3MTMyM1oYDzIxMjYxMDMw
MTcxMzIzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARFa0u+EXxhaHemM8zHBA4z8RP+PxK88WOWAzhNbqbu8lbwll7e62UZ
KZCWNjiiNR9Y3I0z9DCQUJupxbBXURwAo2kwZzAdBgNVHQ4EFgQUDewCR9nxWrAd
J4hfZyKOmOTzJOUwHwYDVR0jBBgwFoAUDewCR9nxWrAdJ4hfZyKOmOTzJOUwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
RwAwRAIgN9jB9KeF04M04S6aP2og35wH4mpUdUA7yCGrmUjQV3ECIGGsxr+zlzVr
BCkDnlWHUUiSeLrJGy7otlTCSvhriuQi
-----END CERTIFICATE-----
""", """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXdMlqMSrlK8/XBmj
WrpmBss8FSO8kElqc8zCcm8SVauhRANCAARFa0u+EXxhaHemM8zHBA4z8RP+PxK8
8WOWAzhNbqbu8lbwll7e62UZKZCWNjiiNR9Y3I0z9DCQUJupxbBXURwA
-----END PRIVATE KEY-----
"""), ("""\
-----BEGIN CERTIFICATE-----
MIIBljCCATugAwIBAgIUApc0uVBaf/8AzyfB9/P/qBsyYjIwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzE3MTMyM1oYDzIxMjYxMDMw
MTcxMzIzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARMCE6Lkc2D8T+jjmvrDx1NrSiNhI5l6D6oC0Qaq+uaIB3JUibqTc9N
Cn/jEXcrHrKUBxY/6leco1sy2B/1tKdyo2kwZzAdBgNVHQ4EFgQUWASBqL0j9vs8
C0Z6eMN8lrCFXJowHwYDVR0jBBgwFoAUWASBqL0j9vs8C0Z6eMN8lrCFXJowDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SQAwRgIhAMKEUx4D8G9xHY4bIIrzJ7Du4A5Du+uXycGzEZwEoQiNAiEA6lzhbwIV
a2xtDzEQC4OU1z/kkBxTEpBWDZo8xQECQkI=
-----END CERTIFICATE-----
""", """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgJVhaNrJZt9ZJ8ZQ3
YjFSgqStrViGT9Y+EM6KTQwvSWihRANCAARMCE6Lkc2D8T+jjmvrDx1NrSiNhI5l
6D6oC0Qaq+uaIB3JUibqTc9NCn/jEXcrHrKUBxY/6leco1sy2B/1tKdy
-----END PRIVATE KEY-----
"""), ("""\
-----BEGIN CERTIFICATE-----
MIIBPjCB5qADAgECAgEHMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMMCWxvY2FsaG9z
dDAeFw0yMDAxMDEwMDAwMDBaFw0yMDAyMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxv
Y2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLsGubKxc/XHC248lt8Q
1CBbavjSObRUQdrMUpJoh/0Rhtv37zVtXl8jpLJooGYRC5nyqiFJX0CojloXRc2m
sWmjKTAnMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/MAoG
CCqGSM49BAMCA0cAMEQCIFSfW9ogmD7D/m8faWx4285EYm7lKEu6GAQOTZl9dlJR
AiBc/dOCA4seb4NDBwvQtTmh/cUGTcv8Hbkc/fYsmOWWew==
-----END CERTIFICATE-----
""", """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQggzQjLv7GGUKnxZUv
fPKU7vIFtMpPXgltWW3/YAns796hRANCAAS7BrmysXP1xwtuPJbfENQgW2r40jm0
VEHazFKSaIf9EYbb9+81bV5fI6SyaKBmEQuZ8qohSV9AqI5aF0XNprFp
-----END PRIVATE KEY-----
"""))


def sign(body):
    """The X-Sipgate-Signature of `body` by the test key (RFC 8017 8.2.1)."""
    digest = sc.SHA256_PREFIX + hashlib.sha256(body).digest()
    block = b"\x00\x01" + b"\xff" * (TEST_KEY.size - 3 - len(digest)) + b"\x00" + digest
    number = pow(int.from_bytes(block, "big"), TEST_KEY_SECRET, TEST_KEY.modulus)
    return base64.b64encode(number.to_bytes(TEST_KEY.size, "big")).decode()


@contextlib.contextmanager
def diagnostics():
    """The list that grows by one text for each message of the script's logger."""
    said = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(self.format(record))

    listener = Listener()
    sc.logger.addHandler(listener)
    sc.logger.propagate = False
    try:
        yield said
    finally:
        sc.logger.removeHandler(listener)


def setUpModule():
    # What a test does not look for is not to appear between the dots.
    sc.logger.addHandler(logging.NullHandler())
    sc.logger.propagate = False
    if os.name != "nt":
        HangingTest.begin()


def wait_until(condition, seconds=10):
    """Wait for `condition`; fail if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        threading.Event().wait(0.005)


# ------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------

class DotenvTest(unittest.TestCase):
    ROWS = (  # text, environment, what it sets
        ("a=b", {}, {"a": "b"}),
        (" a = b ", {}, {"a": "b"}),
        ("export a=b", {}, {"a": "b"}),
        ("export=1", {}, {"export": "1"}),
        ("'a'=b", {}, {"a": "b"}),
        ('"a"=b', {}, {'"a"': "b"}),
        ("a b=c", {}, {}),
        ("a=b # c", {}, {"a": "b"}),
        ("a=b#c", {}, {"a": "b#c"}),
        ("a= # c", {}, {"a": "# c"}),
        ("# a=b", {}, {}),
        ('a="b # c"', {}, {"a": "b # c"}),
        ('a="b" c', {}, {}),
        ('a="b" # c', {}, {"a": "b"}),
        ("a='b c '", {}, {"a": "b c "}),
        ('a="b\\nc"', {}, {"a": "b\nc"}),
        ("a='b\\nc'", {}, {"a": "b\\nc"}),
        (r"a='b\'c\\'", {}, {"a": r"b'c" + "\\"}),
        (r'a="\\ \' \" \a \b \f \n \r \t \v"', {}, {"a": "\\ ' \" \a \b \f \n \r \t \v"}),
        ('a="\\$x"', {}, {"a": "\\$x"}),
        ('a="b\nc"\nd=e', {}, {"a": "b\nc", "d": "e"}),
        ("a='b\r\nc'", {}, {"a": "b\r\nc"}),
        ("a=it's", {}, {"a": "it's"}),
        ("a=b=c", {}, {"a": "b=c"}),
        ("a=$b", {"b": "c"}, {"a": "$b"}),
        ("a='${b}'", {"b": "c"}, {"a": "c"}),
        ("a=${b:-d}", {}, {"a": "d"}),
        ("a=${b:-d}", {"b": ""}, {"a": ""}),
        ("a=${b}", {}, {"a": ""}),
        ("b=1\na=${b}", {"b": "2"}, {"a": "2"}),
        ("b=1\na=${b}\nb=2", {}, {"a": "1", "b": "2"}),
        ("a=${b}\nb=1", {}, {"a": "", "b": "1"}),
        ("a=${b:-${c}}", {"c": "1"}, {"a": "${c}"}),
        ("b\na=${b:-d}", {}, {"a": ""}),
        ("b", {}, {}),
        ("a=", {}, {"a": ""}),
        ("a=1", {"a": ""}, {}),
        ("a=1\rb=2\r\nc=3\nd=4", {}, {"a": "1", "b": "2", "c": "3", "d": "4"}),
        ("\ufeffa=b", {}, {"a": "b"}),
        ('a="b\nc=d', {}, {"c": "d"}),
        ("WEBHOOK_URL=https://x.example/#frag", {}, {"WEBHOOK_URL": "https://x.example/#frag"}),
        ("WEBHOOK_URL=https://x.example/ #frag", {}, {"WEBHOOK_URL": "https://x.example/"}),
    )

    def test_means_what_python_dotenv_makes_of_it(self):
        for text, environ, sets in self.ROWS:
            with self.subTest(text):
                self.assertEqual(parse_dotenv(text, environ), sets)

    def test_a_line_that_cannot_be_read_is_skipped_and_named(self):
        with diagnostics() as said:
            self.assertEqual(parse_dotenv("a=1\r\nb c=2\nd=\"3\" e\nf='4\ng=5", {}), {"a": "1", "g": "5"})
        self.assertEqual(said, [f".env: line {n} is skipped: expected NAME=value, with closed quotes if any" for n in (2, 3, 4)])

    def test_any_text_is_read_without_an_error(self):
        pieces = ["a", "=", "'", '"', "\\", "\n", "\r", " ", "#", "${a}", "${a:-b}", "export ", "\ufeff", "\0", "ä"]
        chance = random.Random(1)
        for _ in range(3000):
            text = "".join(chance.choice(pieces) for _ in range(chance.randrange(12)))
            with self.subTest(text):
                self.assertIsInstance(parse_dotenv(text, {"a": "1"}), dict)


class SettingsTest(unittest.TestCase):
    def problems(self, **values):
        with self.assertRaises(SettingsError) as caught:
            Settings.from_values(values)
        return list(caught.exception.problems)

    def test_nothing_set_is_trial_mode_on_this_machine(self):
        settings = Settings.from_values({})
        self.assertEqual((settings.trial, settings.webhook_host, settings.base_url, settings.verify_signature),
                         (True, "127.0.0.1", "http://localhost:8080", "auto"))

    def test_an_empty_value_is_not_set(self):
        self.assertEqual(Settings.from_values({"WEBHOOK_PORT": "", "WEBHOOK_URL": " "}), Settings.from_values({}))

    def test_a_slash_at_the_end_of_the_url_is_mended(self):
        self.assertEqual(Settings.from_values({"WEBHOOK_URL": "https://example.org/3f/"}).base_url, "https://example.org/3f")

    def test_wrong_values_are_named_with_what_was_expected(self):
        for name, value, expected in [
                ("WEBHOOK_PORT", "80a", "expected a whole number from 1 to 65535, or 0 for any free port"),
                ("WEBHOOK_PORT", "65536", "expected a whole number from 1 to 65535, or 0 for any free port"),
                ("WEBHOOK_PORT", "²", "expected a whole number from 1 to 65535, or 0 for any free port"),
                ("VERIFY_SIGNATURE", "yes", "expected auto, on or off"),
                ("CALL_LOG_DAYS", "0", "expected a whole number of days from 1 to 99999"),
                ("CALL_OUTPUT", "xml", "expected text, json or off"),
                ("WEBHOOK_URL", "https://example.org:99999", "expected a port from 1 to 65535"),
                ("WEBHOOK_URL", "https://example.org:0", "expected a port from 1 to 65535"),
                ("WEBHOOK_HOST", "127.0.0.1:80",
                 "expected an address such as 127.0.0.1 or ::1, without a port (see WEBHOOK_PORT)"),
                ("WEBHOOK_HOST", "http://localhost",
                 "expected an address such as 127.0.0.1 or ::1, without a port (see WEBHOOK_PORT)"),
                ("WEBHOOK_URL", "https://example.org:abc", "expected a port from 1 to 65535"),
                ("WEBHOOK_URL", "https://[::1", "expected a whole address such as https://example.org"),
                ("WEBHOOK_URL", "example.org", "expected a whole address such as https://example.org"),
                ("WEBHOOK_URL", "ftp://example.org", "expected a whole address such as https://example.org"),
                ("WEBHOOK_URL", "https:///x", "expected a whole address such as https://example.org"),
                ("WEBHOOK_URL", "https://me:pw@example.org",
                 "leave out user and password, sipgate's webhooks do not need them"),
                ("WEBHOOK_URL", "https://example.org?a=b", "leave out everything from the ? or # on"),
                ("WEBHOOK_URL", "https://example.org/#a", "leave out everything from the ? or # on"),
                ("WEBHOOK_URL", "https://example.org/ä", "expected a to z, digits, and punctuation that a URL can hold; other letters encoded (xn--, %C3)"),
                ("WEBHOOK_URL", "https://example.org/a/new-call",
                 "leave out /new-call, it is added to https://example.org/a"),
                ("WEBHOOK_URL", "https://example.org/on-hangup/", "leave out /on-hangup, it is added to https://example.org"),
        ]:
            with self.subTest(value):
                self.assertEqual(self.problems(**{name: value}), [f'{name} is "{value}": {expected}'])

    def test_a_certificate_needs_its_key(self):
        for name in ("WEBHOOK_TLS_CERT", "WEBHOOK_TLS_KEY"):
            self.assertEqual(self.problems(**{name: "x.pem"}), [
                "WEBHOOK_TLS_CERT and WEBHOOK_TLS_KEY are set together or not at all: a certificate needs its key"])

    def test_all_wrong_values_are_named_at_once(self):
        self.assertEqual(len(self.problems(WEBHOOK_PORT="x", WEBHOOK_URL="x", CALL_OUTPUT="x")), 3)

    def test_without_a_url_only_this_machine_may_be_listened_to(self):
        problem, = self.problems(WEBHOOK_HOST="0.0.0.0")
        self.assertIn("WEBHOOK_HOST", problem)
        self.assertIn("WEBHOOK_URL", problem)
        for host in ("127.0.0.2", "::1", "localhost"):
            self.assertTrue(Settings.from_values({"WEBHOOK_HOST": host}).trial)

    def test_what_is_probably_not_meant_is_said(self):
        for values, said in [
                ({"WEBHOOK_URL": "http://example.org/3f"}, "newer accounts take https only"),
                ({"WEBHOOK_URL": "https://example.org"}, "such as WEBHOOK_URL=https://example.org/"),
                ({"WEBHOOK_URL": "https://example.org:8080/3f"}, "there must be a tunnel or proxy"),
                ({"WEBHOOK_URL": "https://example.org/3f", "VERIFY_SIGNATURE": "off"}, "anyone who knows the address"),
        ]:
            with self.subTest(said):
                warning, = Settings.from_values(values).warnings()
                self.assertIn(said, warning)

    def test_a_good_set_up_and_trial_mode_are_not_warned_about(self):
        for values in ({}, {"WEBHOOK_URL": "https://example.org/3f9c2a"}, {"WEBHOOK_URL": "http://localhost:8080"},
                       {"WEBHOOK_URL": "http://localhost:8080/3f9c2a"}):
            self.assertEqual(list(Settings.from_values(values).warnings()), [])

    def test_a_relative_path_counts_from_the_given_folder(self):
        folder = os.path.abspath("somewhere")
        settings = Settings.from_values({"CALL_HANDLERS": "mine.py"}, folder)
        self.assertEqual((settings.call_handlers, settings.call_log, settings.signature_key_file),
                         (os.path.join(folder, "mine.py"), os.path.join(folder, "calls.db"), ""))
        self.assertEqual(Settings.from_values({"CALL_LOG": "off"}, folder).call_log, "off")


# ------------------------------------------------------------------------------------------
# Signatures
# ------------------------------------------------------------------------------------------

class SignatureTest(unittest.TestCase):
    KEYS = (PublicKey.from_pem(sc.SIPGATE_PUBLIC_KEY),)

    def signed(self, body=sc.VECTOR_BODY, signature=sc.VECTOR_SIGNATURE):
        return is_signed(body, signature, self.KEYS)

    def test_the_key_is_the_one_that_sipgate_publishes(self):
        der = base64.b64decode("".join(sc.SIPGATE_PUBLIC_KEY.split("\n")[1:-2]))
        self.assertEqual(hashlib.sha256(der).hexdigest(), "893cfd6caad92efc277a5977daec63dee1597223b1df5b2bf69ef56cd92305b3")
        self.assertEqual(self.KEYS[0], PublicKey(int.from_bytes(der[33:545], "big"), int.from_bytes(der[547:550], "big")))

    def test_what_sipgate_signed_is_signed(self):
        self.assertTrue(self.signed())

    def test_another_body_is_not_signed(self):
        for body in (sc.VECTOR_BODY + b"\n", sc.VECTOR_BODY.replace(b"=in", b"=io"), sc.VECTOR_BODY.replace(b"%5B%5D", b"[]"),
                     sc.VECTOR_BODY.replace(b"%5B%5D", b"%5b%5d"), b""):
            with self.subTest(body):
                self.assertFalse(self.signed(body))

    def test_another_spelling_of_the_signature_is_refused(self):
        for label, signature in [
                ("cut", sc.VECTOR_SIGNATURE[:-4]), ("no padding", sc.VECTOR_SIGNATURE[:-1]), ("none", None), ("empty", ""),
                ("blank inside", sc.VECTOR_SIGNATURE[:99] + " " + sc.VECTOR_SIGNATURE[99:]),
                ("line feed inside", sc.VECTOR_SIGNATURE[:76] + "\n" + sc.VECTOR_SIGNATURE[76:]),
                ("line feed behind", sc.VECTOR_SIGNATURE + "\n"), ("not canonical", sc.VECTOR_SIGNATURE[:-2] + "1="),
                ("URL alphabet", sc.VECTOR_SIGNATURE.replace("/", "_")), ("not ASCII", sc.VECTOR_SIGNATURE[:-1] + "\xe4"),
                ("twice", sc.VECTOR_SIGNATURE * 2)]:
            with self.subTest(label):
                self.assertFalse(self.signed(signature=signature))

    def test_a_signature_plus_the_modulus_is_refused(self):
        bodies = (str(n).encode() for n in range(100))
        sums = ((body, int.from_bytes(base64.b64decode(sign(body)), "big") + TEST_KEY.modulus) for body in bodies)
        body, second = next((body, total) for body, total in sums if total < 1 << 2048)
        self.assertTrue(is_signed(body, sign(body), [TEST_KEY]))
        self.assertFalse(is_signed(body, base64.b64encode(second.to_bytes(256, "big")).decode(), [TEST_KEY]))

    def test_no_bit_of_the_signature_may_change(self):
        signature = base64.b64decode(sc.VECTOR_SIGNATURE)
        for bit in range(0, 4096, 37):
            changed = bytearray(signature)
            changed[bit // 8] ^= 1 << bit % 8
            with self.subTest(bit):
                self.assertFalse(self.signed(signature=base64.b64encode(changed).decode()))

    def test_any_header_gives_true_or_false(self):
        chance = random.Random(2)
        for _ in range(2000):
            signature = list(sc.VECTOR_SIGNATURE)
            for _ in range(chance.randrange(1, 4)):
                signature[chance.randrange(len(signature))] = chance.choice(["", "A", "=", "\n", "\xff", "\u20ac", "AA"])
            if "".join(signature) != sc.VECTOR_SIGNATURE:
                self.assertIs(self.signed(signature="".join(signature)), False)

    def test_a_further_key_counts_as_well(self):
        self.assertTrue(is_signed(b"a=b", sign(b"a=b"), [*self.KEYS, TEST_KEY]))
        self.assertFalse(is_signed(b"a=b", sign(b"a=b"), self.KEYS))
        self.assertFalse(is_signed(b"a=b", sign(b"a=b"), []))

    def test_a_file_that_holds_no_key_of_this_kind_is_named(self):
        lines = TEST_KEY_PEM.split("\n")
        for text, said in [
                ("", 'expected a PEM file with "-----BEGIN PUBLIC KEY-----" in it'),
                (TEST_KEY_PEM.replace("PUBLIC", "PRIVATE"), 'expected a PEM file with "-----BEGIN PUBLIC KEY-----" in it'),
                ("\n".join(lines[:1] + lines[2:]), "expected an RSA key"),
                ("\n".join(lines[:3] + lines[-2:]), "expected an RSA key"),
                ("-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEPpOwEgAw2ZIsEAaGcXKSSsHaggf4\n"
                 "KngXyppy5N+qs+zE1SPlO3VOI/D1Z3DlPj491iRv772lgY1zBPmrY8UvRQ==\n-----END PUBLIC KEY-----", "expected an RSA key"),
        ]:
            with self.subTest(said), self.assertRaises(ValueError) as caught:
                PublicKey.from_pem(text)
            self.assertEqual(str(caught.exception), said)


# ------------------------------------------------------------------------------------------
# Call events
# ------------------------------------------------------------------------------------------

class EventTest(unittest.TestCase):
    def test_a_new_call_has_all_its_fields(self):
        body = NEW_CALL + b"&origCallId=123455&xcid=00ab&diversion=4921100000"
        event = parse_event(body, "newCall")
        self.assertEqual(event, NewCallEvent(
            call_id="123456", fields=event.fields, from_number="492111234567", to_number="4915791234567", direction="in",
            orig_call_id="123455", xcid="00ab", diversion="4921100000", users=("Alice", "Bob"), user_ids=("w0", "w1"),
            full_user_ids=("1234567w0", "1234567w1")))

    def test_an_answer_has_all_its_fields(self):
        event = parse_event(ANSWER, "answer")
        self.assertEqual(event, AnswerEvent(
            call_id="123456", fields=event.fields, from_number="492111234567", to_number="4915791234567", direction="in",
            user="John Doe", user_id="w0", full_user_id="1234567w0", answering_number="21199999999"))

    def test_a_hangup_has_all_its_fields(self):
        event = parse_event(HANGUP, "hangup")
        self.assertEqual(event, HangupEvent(
            call_id="123456", fields=event.fields, from_number="492111234567", to_number="4915791234567", direction="in",
            cause="normalClearing", answering_number="4921199999999"))

    def test_digits_are_text(self):
        event = parse_event(b"event=dtmf&dtmf=0042*%23&callId=1", "dtmf", "language")
        self.assertEqual(event, DtmfEvent(call_id="1", fields=event.fields, dtmf="0042*#", state="language"))

    def test_lists_are_taken_in_all_three_spellings(self):
        for key in (b"user[]", b"user%5B%5D", b"user%5b%5d", b"user%5B%5D%5B0%5D"):
            with self.subTest(key):
                self.assertEqual(parse_event(key + b"=Al+ice", "newCall").users, ("Al ice",))

    def test_a_list_with_one_empty_value_is_empty(self):
        self.assertEqual(parse_event(b"user%5B%5D=&callId=1", "newCall").users, ())
        self.assertEqual(parse_event(b"user[]=A&user[]=&callId=1", "newCall").users, ("A", ""))

    def test_what_is_missing_or_empty_is_empty(self):
        self.assertEqual(parse_event(b"", "newCall"), NewCallEvent())
        self.assertEqual(parse_event(b"from=&callId=", "answer").from_number, "")

    def test_the_event_in_the_body_decides(self):
        self.assertIsInstance(parse_event(b"event=hangup&callId=1", "newCall"), HangupEvent)
        self.assertIsInstance(parse_event(b"callId=1", "answer"), AnswerEvent)

    def test_unknown_events_and_fields_are_kept(self):
        event = parse_event(b"event=transfer&callId=1&mood=good&mood=bad&user=U", "newCall")
        self.assertEqual(event, UnknownEvent(call_id="1", event="transfer", fields={
            "event": ["transfer"], "callId": ["1"], "mood": ["good", "bad"], "user": ["U"]}))
        self.assertEqual(parse_event(b"callId=1&later=", "newCall").fields, {"callId": ["1"], "later": [""]})

    def test_a_call_for_a_large_group_is_taken(self):
        body = b"callId=1" + b"".join(b"&user[]=U%d&userId[]=w%d&fullUserId[]=1w%d" % (n, n, n) for n in range(1000))
        self.assertEqual(len(parse_event(body, "newCall").users), 1000)

    def test_umlauts_are_read_encoded_and_raw(self):
        for body in (b"user[]=J%C3%BCrgen", "user[]=Jürgen".encode()):
            self.assertEqual(parse_event(body, "newCall").users, ("Jürgen",))
        self.assertEqual(parse_event(b"user[]=J\xfcrgen", "newCall").users, ("J\ufffdrgen",))

    def test_what_is_no_event_is_refused(self):
        for body, default, status, reason in [
                (b"hello", "newCall", 400, "the body is no form (application/x-www-form-urlencoded)"),
                (b'{"event": 1}', "newCall", 400, "the body is no form (application/x-www-form-urlencoded)"),
                (b"callId=1&callId=2", "newCall", 400, "the form has callId more than once"),
                (b"event=newCall&event=hangup", "newCall", 400, "the form has event more than once"),
                (b"callId=1", "", 404, "no event is named"),
                (b"", "", 404, "no event is named")]:
            with self.subTest(body), self.assertRaises(WebhookError) as caught:
                parse_event(body, default)
            self.assertEqual((caught.exception.status, caught.exception.reason), (status, reason))

    def test_any_body_gives_an_event_or_the_documented_error(self):
        chance = random.Random(3)
        for _ in range(3000):
            body = bytearray(chance.choice([NEW_CALL, ANSWER, HANGUP, DTMF]))
            for _ in range(chance.randrange(1, 9)):
                body[chance.randrange(len(body))] = chance.choice(b"&=%[]+;\x00\xff\n a5")
            with contextlib.suppress(WebhookError):
                self.assertIsInstance(parse_event(bytes(body), "newCall"), sc.CallEvent)


# ------------------------------------------------------------------------------------------
# Actions and XML
# ------------------------------------------------------------------------------------------

class ActionTest(unittest.TestCase):
    GOLDEN = (  # from sipgate's API reference
        ("<Response><Dial><Number>4915799912345</Number></Dial></Response>", dial("4915799912345")),
        ("<Response><Dial><Voicemail /></Dial></Response>", voicemail()),
        ('<Response><Dial anonymous="true"><Number>4915799912345</Number></Dial></Response>',
         dial("4915799912345", anonymous=True)),
        ('<Response><Dial callerId="492111234567"><Number>4915799912345</Number></Dial></Response>',
         dial("4915799912345", caller_id="492111234567")),
        ("<Response><Dial><Number>4915799912345</Number><Number>492111234567</Number></Dial></Response>",
         dial("4915799912345", "492111234567")),
        ("<Response><Play><Url>http://example.com/example.wav</Url></Play></Response>",
         play("http://example.com/example.wav")),
        ('<Response><Gather onData="http://localhost:3000/dtmf" maxDigits="3" timeout="10000"><Play>'
         "<Url>https://example.com/example.wav</Url></Play></Gather></Response>",
         gather("http://localhost:3000/dtmf", play="https://example.com/example.wav", max_digits=3, timeout_ms=10000)),
        ("<Response><Reject /></Response>", reject()),
        ('<Response><Reject reason="busy" /></Response>', reject("busy")),
        ("<Response><Hangup /></Response>", hang_up()),
    )

    def assert_xml(self, document, expected):
        self.assertEqual(ET.canonicalize(document.decode("ascii")), ET.canonicalize(expected))

    def test_each_action_reads_as_in_the_reference(self):
        for expected, action in self.GOLDEN:
            with self.subTest(expected):
                self.assert_xml(response_xml(action), expected)

    def test_follow_ups_read_as_in_the_reference(self):
        self.assert_xml(response_xml(on_answer="http://localhost:3000/answer"),
                        '<Response onAnswer="http://localhost:3000/answer" />')
        self.assert_xml(response_xml(on_hangup="http://localhost:3000/hangup"),
                        '<Response onHangup="http://localhost:3000/hangup" />')
        self.assert_xml(response_xml(), "<Response />")

    def test_a_gather_without_a_url_comes_back_to_us_with_its_state(self):
        self.assert_xml(response_xml(gather(state="a&b ü"), on_data="http://x/on-data"),
                        '<Response><Gather onData="http://x/on-data?state=a%26b+%C3%BC" maxDigits="1" timeout="2000" />'
                        "</Response>")
        self.assert_xml(response_xml(gather("https://y/?a=b", state="s")),
                        '<Response><Gather onData="https://y/?a=b&amp;state=s" maxDigits="1" timeout="2000" /></Response>')
        with self.assertRaises(ValueError):
            response_xml(gather())

    def test_numbers_are_cleaned(self):
        self.assertEqual(dial(" +49 (157) 999-123/45"), dial("4915799912345"))

    def test_what_sipgate_would_not_understand_is_refused_when_it_is_built(self):
        digits = "expected text of digits with the country code, such as '4915799912345'"
        url = "expected a URL that begins with http:// or https://"
        whole = "expected a whole number of 1 or more"
        for build, message in [
                (lambda: dial(), "numbers: 0 were given, expected 1 to 5"),
                (lambda: dial(*"123456"), "numbers: 6 were given, expected 1 to 5"),
                (lambda: dial("anonymous"), f"numbers is 'anonymous': {digits}"),
                (lambda: dial(""), f"numbers is '': {digits}"),
                (lambda: dial("4\x001"), f"numbers is '4\\x001': {digits}"),
                (lambda: dial("٤٩"), f"numbers is '٤٩': {digits}"),
                (lambda: dial("+49 (0) 211 1"), f"numbers is '+49 (0) 211 1': {digits}"),
                (lambda: dial(["1", "2"]), f"numbers is ['1', '2']: {digits}"),
                (lambda: dial(4921100), f"numbers is 4921100: {digits}"),
                (lambda: dial("1", caller_id="me"), f"caller_id is 'me': {digits}"),
                (lambda: dial("1", anonymous="yes"), "anonymous is 'yes': expected True or False"),
                (lambda: play("example.wav"), f"url is 'example.wav': {url}"),
                (lambda: play("http://:80/x"), f"url is 'http://:80/x': {url}"),
                (lambda: gather("http://x/#f", state="s"), f"url is 'http://x/#f': {url}"),
                (lambda: play("http:///x.wav"), f"url is 'http:///x.wav': {url}"),
                (lambda: play("http://x/\x0b"), f"url is 'http://x/\\x0b': {url}"),
                (lambda: play("http://x/a b"), f"url is 'http://x/a b': {url}"),
                (lambda: gather("/on-data"), f"url is '/on-data': {url}"),
                (lambda: gather(play="x"), f"play is 'x': {url}"),
                (lambda: gather(max_digits=0), f"max_digits is 0: {whole}"),
                (lambda: gather(max_digits=True), f"max_digits is True: {whole}"),
                (lambda: gather(timeout_ms=0.5), f"timeout_ms is 0.5: {whole}"),
                (lambda: gather(state="\ud800"), "state is '\\ud800': expected text"),
                (lambda: gather(state=1), "state is 1: expected text"),
                (lambda: reject("later"), "reason is 'later': expected 'rejected' or 'busy'")]:
            with self.subTest(message), self.assertRaises(ValueError) as caught:
                build()
            self.assertEqual(str(caught.exception), message)


# ------------------------------------------------------------------------------------------
# Call log
# ------------------------------------------------------------------------------------------

class CallLogTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "calls.db")
        self.now = 1e9

    def open(self, days=30, path=None, wait=True, **limits):
        class Log(CallLog):
            RETRY_SECONDS = LOCK_SECONDS = LOOK_SECONDS = 0.02

        for name, value in limits.items():
            setattr(Log, name, value)
        log = Log(path or self.path, days, lambda: self.now)
        self.addCleanup(log.close, 5)
        if wait:  # for the tidying at the start
            wait_until(lambda: log._tidy_at and not log._tidying)
        return log

    def record(self, log, call_id, digest=None, seconds=5, body=b"a=b", received_at=None):
        return log.record((received_at or self.now, "newCall", call_id, body, digest), seconds)

    def rows(self, what="call_id", path=None):
        with contextlib.closing(sqlite3.connect(path or self.path)) as connection:
            return [row[0] for row in connection.execute(f"SELECT {what} FROM events ORDER BY id")]

    def test_what_is_recorded_is_on_disk_when_record_returns(self):
        log = self.open()
        self.assertTrue(self.record(log, "1", body=b"\xff\0"))
        self.assertEqual(self.rows("hex(body) || received_at || event || call_id"), ["FF001000000000.0newCall1"])
        self.assertEqual(log.count(), 1)

    def test_an_exact_repeat_is_stored_once_where_that_is_asked_for(self):
        log = self.open()
        self.assertEqual([self.record(log, "1", digest) for digest in (b"d", b"d", b"e", None, None)],
                         [True, False, True, True, True])
        self.assertEqual(log.count(), 4)

    def test_it_survives_a_restart_and_two_may_share_it(self):
        first = self.open()
        self.record(first, "1", b"d")
        second = self.open()
        self.assertFalse(self.record(second, "1", b"d"))
        self.record(second, "2")
        self.record(first, "3")
        self.assertEqual(self.rows(), ["1", "2", "3"])

    @unittest.skipIf(os.name == "nt", "permissions")
    def test_nobody_else_can_read_it(self):
        with open(self.path, "w"):
            pass
        os.chmod(self.path, 0o644)
        log = self.open()
        self.record(log, "1")
        self.assertEqual({name: oct(os.stat(os.path.join(self.folder, name)).st_mode & 0o777) for name in os.listdir(self.folder)},
                         {"calls.db": "0o600", "calls.db-wal": "0o600", "calls.db-shm": "0o600"})

    def test_signed_calls_of_the_last_day_are_found_again(self):
        log = self.open()
        for call_id, digest, age in [("1", b"1", 90_000), ("2", b"2", 50), ("3", None, 40), ("4", b"4", 30), ("5", b"5", 20)]:
            self.record(log, call_id, digest, received_at=self.now - age)
        self.assertEqual(log.signed_calls(self.now - 86_400, 2), [("5", self.now - 20), ("4", self.now - 30)])

    def test_a_file_that_is_not_ours_is_refused_and_left_alone(self):
        foreign = sqlite3.connect(os.path.join(self.folder, "foreign.db"))
        foreign.executescript("CREATE TABLE events(a); PRAGMA application_id=1")
        foreign.close()
        with open(os.path.join(self.folder, "text"), "w") as file:
            file.write("numbers I want to keep")
        for name in ("foreign.db", "text"):
            path = os.path.join(self.folder, name)
            with open(path, "rb") as file:
                before = file.read()
            with self.subTest(name), self.assertRaises(SettingsError) as caught:
                self.open(path=path)
            self.assertIn("is not a call log of this program, and is left alone", str(caught.exception))
            with open(path, "rb") as file:
                self.assertEqual(file.read(), before)
        self.assertEqual(sorted(os.listdir(self.folder)), ["foreign.db", "text"])

    def test_a_file_of_a_newer_version_is_refused(self):
        self.open().close(5)
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA user_version=99")
        with self.assertRaises(SettingsError) as caught:
            self.open()
        self.assertIn("a newer version of this program wrote it", str(caught.exception))

    def test_a_folder_that_cannot_be_written_is_named(self):
        for path in (os.path.join(self.folder, "none", "calls.db"), self.folder):
            with self.assertRaises(SettingsError) as caught:
                self.open(path=path)
            self.assertIn("expected a file in a folder that this user may write, or off", str(caught.exception))

    def damage(self):
        with open(self.path, "r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 9000)

    def test_a_damaged_file_is_put_aside_and_a_new_one_begun(self):
        log = self.open()
        self.record(log, "1")
        log.close(5)
        self.damage()
        with diagnostics() as said:
            log = self.open()
            wait_until(lambda: not log.behind)
        self.assertTrue(self.record(log, "2"))
        self.assertIn(f"the call log was damaged; it is now {self.path}.damaged-20010909T014640Z, and a new one is begun", said)
        self.assertEqual(self.rows(), ["2"])
        self.assertTrue(os.path.exists(self.path + ".damaged-20010909T014640Z"))

    def test_damage_while_it_runs_loses_no_event_that_comes_then(self):
        log = self.open()
        self.record(log, "1")
        log.close(5)
        log = self.open()
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.damage()
        self.record(log, "2", b"2")
        self.record(log, "3", b"3")
        wait_until(lambda: not log.behind)
        self.assertEqual(self.rows()[-2:], ["2", "3"])

    def test_locked_by_another_process_it_falls_behind_and_catches_up_in_order(self):
        log = self.open()
        other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN EXCLUSIVE")
        with diagnostics() as said:
            began = time.monotonic()
            for call_id in "1234567":
                self.assertIsNone(self.record(log, call_id, seconds=0.1))
            self.assertLess(time.monotonic() - began, 0.5, "only the first waits")
            self.assertIn(log.behind, ("database is locked", "storing takes longer than a call can wait"))
            other.execute("COMMIT")
            wait_until(lambda: not log.behind)
        self.assertEqual([line.partition(" (")[0] for line in said],
                         ["the call log is behind", "the call log has caught up: all events are stored"])
        self.assertEqual(self.rows(), list("1234567"))
        self.assertTrue(self.record(log, "8"))

    def test_locked_at_the_start_it_starts_all_the_same(self):
        self.open().close(5)
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            log = self.open(wait=False)
            self.assertIn("locked", log.behind)
            self.assertIsNone(self.record(log, "1"))
            self.assertEqual((log.count(), log.signed_calls(0, 1)), (0, None))
        wait_until(lambda: not log.behind)
        self.assertEqual(self.rows(), ["1"])

    def test_a_deleted_file_is_begun_anew_at_once(self):
        log = self.open()
        self.record(log, "1")
        for name in os.listdir(self.folder):
            os.remove(os.path.join(self.folder, name))
        self.assertTrue(self.record(log, "2"))
        self.assertEqual(self.rows(), ["2"])
        os.remove(self.path)
        wait_until(lambda: os.path.exists(self.path))  # with no event at all

    def test_a_file_that_is_moved_keeps_what_was_stored_in_it(self):
        log = self.open()
        for n in range(20):
            self.record(log, str(n))
        os.rename(self.path, self.path + ".old")
        self.record(log, "new")
        self.assertEqual(self.rows(path=self.path + ".old")[:20], [str(n) for n in range(20)])
        self.assertEqual(self.rows(), ["new"])
        other = os.path.join(self.folder, "other.db")
        second = self.open(path=other)
        for n in range(300):
            self.record(second, f"other{n}")
        second.close(5)
        self.record(log, "newer")
        os.replace(other, self.path)
        self.record(log, "newest")
        self.assertEqual(self.rows(), [f"other{n}" for n in range(300)] + ["newest"])

    def test_a_deleted_write_ahead_log_takes_nothing_with_it(self):
        log = self.open()
        for n in range(20):
            self.record(log, str(n))
            if n == 10:
                os.remove(self.path + "-wal")
                wait_until(lambda: os.path.exists(self.path + "-wal"))  # it is noticed in a moment
        self.assertEqual(self.rows(), [str(n) for n in range(20)])

    def test_every_commit_reaches_the_disk(self):
        log = self.open()
        self.assertEqual([log._connection.execute("PRAGMA " + name).fetchone()[0]
                          for name in ("synchronous", "secure_delete", "journal_mode")], [2, 1, "wal"])

    def test_an_event_stored_at_the_second_try_is_no_repeat(self):
        log = self.open()
        entry = sc._Entry((self.now, "hangup", "1", b"", b"digest"))
        other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(other.close)
        entry.is_new = True  # as the first try said, whose commit failed and took effect
        other.execute("INSERT INTO events(received_at, event, call_id, body, digest) VALUES (?, ?, ?, ?, ?)", entry.row)
        log._queue.put(entry)
        self.assertTrue(entry.stored.acquire(timeout=5))
        self.assertEqual((entry.is_new, self.rows()), (True, ["1"]))

    def test_without_its_folder_it_is_behind_until_that_is_back(self):
        inner = os.path.join(self.folder, "inner")
        os.mkdir(inner)
        self.path = os.path.join(inner, "calls.db")
        log = self.open()
        shutil.rmtree(inner)
        self.assertIsNone(self.record(log, "1", seconds=0.1))
        self.assertIsNone(self.record(log, "2"))
        wait_until(lambda: "No such file" in log.behind or "longer than" in log.behind)
        os.mkdir(inner)
        wait_until(lambda: not log.behind)
        self.assertEqual(self.rows(), ["1", "2"])

    def test_a_commit_that_failed_and_is_there_all_the_same_is_not_stored_twice(self):
        log = self.open()
        log._uncertain = True
        for call_id in "112":
            self.record(log, call_id)
            log._uncertain = True
        self.assertEqual(self.rows(), ["1", "2"])

    def test_past_its_room_events_are_dropped_and_named(self):
        log = self.open(QUEUE=2)
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other, diagnostics() as said:
            other.execute("BEGIN EXCLUSIVE")
            for call_id in "1234":
                self.record(log, call_id, seconds=0.05)
            self.assertEqual([line for line in said if "no room" in line], [
                f"the call log has no room: newCall of call {call_id} is not stored, since 2 events wait for the disk"
                for call_id in "34"])
        wait_until(lambda: not log.behind)
        self.assertEqual(self.rows(), ["1", "2"])

    def test_at_the_end_all_that_is_queued_is_stored_or_named(self):
        log = self.open()
        for n in range(500):
            self.record(log, str(n), seconds=0)
        log.close(10)
        self.assertEqual(self.rows(), [str(n) for n in range(500)])
        log = self.open()
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other, diagnostics() as said:
            other.execute("BEGIN EXCLUSIVE")
            self.record(log, "a", seconds=0)
            self.record(log, "b", seconds=0)
            log.close(0.2)
        self.assertIn("2 events could not be stored before the end, of the calls a, b", said)

    def test_no_byte_of_an_old_number_is_left(self):
        log = self.open(days=30)
        old = b"event=newCall&callId=OLDCALL%05d&from=49999911122"
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.executemany("INSERT INTO events(received_at, event, call_id, body) VALUES (?, 'newCall', ?, ?)", (
                (self.now - 86400 * (40 if n % 2 else 20), "OLDCALL" if n % 2 else f"new{n}",
                 old % n if n % 2 else b"from=4988800011&callId=new%d" % n) for n in range(20_000)))
            other.execute("COMMIT")
            reader = sqlite3.connect(self.path, isolation_level=None)
            self.addCleanup(reader.close)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM events").fetchone()  # in the way of the checkpoint for a while
            log._tidy_at = 0
            wait_until(lambda: other.execute("SELECT count(*) FROM events").fetchone() == (10_000,), 20)
            self.assertTrue(self.record(log, "between"))
            reader.execute("COMMIT")
        wait_until(lambda: log._tidying is None)
        names = os.listdir(self.folder)
        self.assertEqual(sorted(names), ["calls.db", "calls.db-shm", "calls.db-wal"])
        for name in names:
            with open(os.path.join(self.folder, name), "rb") as file:
                content = file.read()
            self.assertEqual([content.count(b"OLDCALL"), content.count(b"49999911122")], [0, 0], name)
        self.assertEqual(log.count(), 10_001)

    def test_what_is_left_of_a_removal_cut_short_goes_the_next_time(self):
        log = self.open()
        log.close(5)
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.executescript("BEGIN; INSERT INTO events(received_at, event, call_id, body) VALUES (1e9, 'newCall', '1', "
                                "zeroblob(20000)); DELETE FROM events; COMMIT")
            self.assertGreater(other.execute("PRAGMA freelist_count").fetchone()[0], 0)
        log = self.open()
        wait_until(lambda: log._tidy_at and log._tidying is None)
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            self.assertEqual(other.execute("PRAGMA freelist_count").fetchone()[0], 0)

    def test_a_removal_that_a_lock_cuts_short_is_taken_up_again(self):
        log = self.open(TIDY_RETRY_SECONDS=0)
        self.record(log, "OLDCALL", received_at=self.now - 86400 * 40)
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            log._tidy_at = 0
            self.assertIsNone(self.record(log, "1", seconds=0.1))
            other.execute("COMMIT")
        wait_until(lambda: log._tidy_at > self.now and not log._tidying and not log.behind)
        for name in os.listdir(self.folder):
            with open(os.path.join(self.folder, name), "rb") as file:
                self.assertNotIn(b"OLDCALL", file.read(), name)

    def test_damaged_files_put_aside_go_after_the_same_time(self):
        old, young = self.path + ".damaged-1", self.path + ".damaged-2"
        for path, age in ((old, 31), (young, 29)):
            with open(path, "w"):
                pass
            os.utime(path, (self.now - age * 86400,) * 2)
        self.open()
        wait_until(lambda: not os.path.exists(old))
        self.assertTrue(os.path.exists(young))


# ------------------------------------------------------------------------------------------
# Receiving
# ------------------------------------------------------------------------------------------

NO_FUNCTIONS = CallFunctions()
TRIAL = Settings()
LIVE = Settings(webhook_url="https://example.localhost.run")
LIVE_XML = (b'<Response onAnswer="https://example.localhost.run/on-answer" '
            b'onHangup="https://example.localhost.run/on-hangup" />\n')
BARE_XML = b"<Response />\n"


def refusal(function, *arguments):
    """Status and reason of the WebhookError that the call raises."""
    try:
        reply = function(*arguments)
    except WebhookError as error:
        return error.status, error.reason
    raise AssertionError(f"not refused: {reply}")


class ReceiverTest(unittest.TestCase):
    def receiver(self, settings=LIVE, functions=NO_FUNCTIONS):
        self.now, self.shown = 1e9, []
        return Receiver(settings, [TEST_KEY], functions, lambda event, received_at: self.shown.append((event, received_at)),
                        lambda: self.now)

    def test_a_signed_new_call_gets_the_follow_ups(self):
        reply = self.receiver().receive("/new-call", NEW_CALL, sign(NEW_CALL))
        self.assertEqual((reply.status, reply.content_type, reply.body), (200, "application/xml", LIVE_XML))
        (event, received_at), = self.shown
        self.assertEqual((event.call_id, received_at), ("123456", 1e9))

    def test_the_follow_up_urls_come_from_the_setting_alone(self):
        reply = self.receiver().receive("/new-call", NEW_CALL, sign(NEW_CALL), "evil.example")
        self.assertEqual(reply.body, LIVE_XML)

    def test_each_refusal_of_a_signature_says_which(self):
        receiver = self.receiver()
        for signature, refused in [(None, (403, "signature missing, see VERIFY_SIGNATURE")),
                                   ("x", (403, "signature malformed, see SIGNATURE_KEY_FILE")),
                                   (sc.VECTOR_SIGNATURE, (403, "signature malformed, see SIGNATURE_KEY_FILE")),
                                   (sign(HANGUP), (403, "signature does not match, see SIGNATURE_KEY_FILE"))]:
            with self.subTest(refused):
                self.assertEqual(refusal(receiver.receive, "/new-call", NEW_CALL, signature), refused)
        self.assertEqual((self.shown, receiver.refused), ([], 4))

    def test_nothing_is_parsed_before_it_is_verified(self):
        for settings in (LIVE, replace(LIVE, verify_signature="on"), replace(TRIAL, verify_signature="on")):
            receiver = self.receiver(settings)
            self.assertEqual(refusal(receiver.receive, "/new-call", b"no form", sign(b"x"))[0], 403)
            self.assertEqual(refusal(receiver.receive, "/new-call", b"no form", None, "example.org")[0], 403)

    def test_a_clock_that_was_never_set_makes_no_call_known(self):
        receiver = self.receiver()
        self.now = 5.0
        for body in (HANGUP, b"event=hangup"):
            self.assertEqual(refusal(receiver.receive, "/on-hangup", body)[0], 403)

    def test_the_public_vector_is_no_event(self):
        receiver = Receiver(LIVE, sc.load_keys(""), CallFunctions())
        self.assertEqual(refusal(receiver.receive, "/new-call", sc.VECTOR_BODY, sc.VECTOR_SIGNATURE), (400, "callId is missing"))

    def test_unsigned_events_of_a_signed_call_are_taken_for_a_day(self):
        receiver, missing = self.receiver(), (403, "signature missing, see VERIFY_SIGNATURE")
        self.assertEqual(refusal(receiver.receive, "/on-hangup", HANGUP), missing)
        receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL))
        with diagnostics() as said:
            for path, body in [("/on-answer", ANSWER), ("/on-data", DTMF), ("/on-hangup", HANGUP)]:
                self.assertEqual(receiver.receive(path, body).status, 200)
        self.assertEqual(len(said), 1)
        self.assertEqual(refusal(receiver.receive, "/new-call", NEW_CALL), missing)
        self.assertEqual(refusal(receiver.receive, "/on-hangup", b"event=hangup&callId=1234567"), missing)
        self.assertEqual(refusal(receiver.receive, "/on-hangup", b"event=hangup&callId="), missing)
        self.assertEqual(refusal(receiver.receive, "/on-hangup", b"event=pause&callId=123456"), missing)
        self.assertEqual(refusal(receiver.receive, "/on-hangup", b"nonsense"), missing)
        self.now += 24 * 3600
        self.assertEqual(refusal(receiver.receive, "/on-hangup", HANGUP), missing)

    def test_a_wrong_signature_is_refused_even_for_a_known_call(self):
        receiver = self.receiver()
        receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL))
        self.assertEqual(refusal(receiver.receive, "/on-hangup", HANGUP, sign(ANSWER))[0], 403)

    def test_the_memory_of_calls_is_bounded(self):
        receiver = self.receiver()
        receiver.KNOWN_CALLS = 2
        for call in (b"callId=1", b"callId=2", b"callId=3"):
            receiver.receive("/new-call", call, sign(call))
        self.assertEqual(refusal(receiver.receive, "/on-hangup", b"callId=1")[0], 403)
        self.assertEqual(receiver.receive("/on-hangup", b"callId=2").status, 200)

    def test_verify_signature_on_wants_every_event_signed(self):
        receiver = self.receiver(replace(LIVE, verify_signature="on"))
        receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL))
        self.assertEqual(refusal(receiver.receive, "/on-hangup", HANGUP)[0], 403)
        self.assertEqual(receiver.receive("/on-hangup", HANGUP, sign(HANGUP)).status, 200)
        trial = self.receiver(replace(TRIAL, verify_signature="on"))
        self.assertEqual(refusal(trial.receive, "/new-call", NEW_CALL)[0], 403)

    def test_verify_signature_off_takes_everything(self):
        receiver = self.receiver(replace(LIVE, verify_signature="off"))
        self.assertEqual(receiver.receive("/new-call", b"callId=").body, LIVE_XML)
        self.assertEqual(receiver.receive("/on-hangup", HANGUP, "nonsense").status, 200)

    def test_trial_mode_needs_no_signature_from_this_machine(self):
        receiver = self.receiver(TRIAL)
        for _ in range(2):
            self.assertEqual(receiver.receive("/new-call", NEW_CALL).body, (
                b'<Response onAnswer="http://localhost:8080/on-answer" onHangup="http://localhost:8080/on-hangup" />\n'))
        self.assertEqual(len(self.shown), 2)
        self.assertEqual(refusal(receiver.receive, "/new-call", NEW_CALL, sign(HANGUP))[0], 403)

    def test_trial_mode_answers_a_tunnel_without_follow_ups_and_says_how_to_go_on(self):
        receiver = self.receiver(TRIAL)
        self.assertEqual(refusal(receiver.receive, "/new-call", NEW_CALL, None, "abc.lhr.life")[0], 403)
        with diagnostics() as said:
            self.assertEqual(receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL), "abc.lhr.life").body, BARE_XML)
        self.assertEqual(said, ["this came in for abc.lhr.life; restart with --url https://abc.lhr.life "
                                "to get answer and hangup too"])
        self.assertEqual(refusal(receiver.receive, "/on-hangup", HANGUP, None, "abc.lhr.life")[0], 403)

    def test_the_path_of_the_url_counts(self):
        receiver = self.receiver(Settings(webhook_url="https://example.org/3f"))
        self.assertIn(b'"https://example.org/3f/on-answer"', receiver.receive("/3f/new-call", NEW_CALL, sign(NEW_CALL)).body)
        with self.assertRaises(WebhookError) as caught:
            receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL))
        self.assertEqual(caught.exception.status, 404)
        self.assertIn("the proxy cuts off the path", caught.exception.detail)
        for path in ("/", "/3f/new-call/", "/3F/new-call", "/3f/new%2Dcall", "/3f//new-call"):
            self.assertEqual(refusal(receiver.receive, path, NEW_CALL, sign(NEW_CALL)), (404, "not found"))

    def test_on_the_base_path_the_body_says_which_event_it_is(self):
        for settings, paths in [(LIVE, ["/"]), (Settings(webhook_url="https://example.org/3f"), ["/3f", "/3f/"])]:
            for path in paths:
                receiver = self.receiver(settings)
                self.assertEqual(receiver.receive(path, HANGUP, sign(HANGUP)).body, b"This response will be discarded")
                self.assertEqual(refusal(receiver.receive, path, b"callId=1", sign(b"callId=1"))[0], 404)

    def test_an_event_on_the_path_of_another_is_taken_with_a_warning(self):
        receiver = self.receiver()
        with diagnostics() as said:
            self.assertEqual(receiver.receive("/on-answer", HANGUP, sign(HANGUP)).status, 200)
        self.assertEqual(said, ["event hangup came in on /on-answer, the path of another event: "
                                "check the URLs entered at sipgate"])
        self.assertIsInstance(self.shown[0][0], HangupEvent)

    def test_an_unknown_event_gets_an_empty_response(self):
        body = b"event=pause&callId=1"
        self.assertEqual(self.receiver().receive("/new-call", body, sign(body)).body, BARE_XML)
        self.assertEqual(self.shown[0][0].event, "pause")

    def test_the_state_of_a_gather_comes_back(self):
        seen = []
        receiver = self.receiver(functions=CallFunctions(on_dtmf=lambda event: seen.append(event.state)))
        for target in ("/on-data?state=a%26b+%C3%BC", "/on-data", "/on-data?state=%ff&&x"):
            receiver.receive(target, DTMF, sign(DTMF))
        self.assertEqual(seen, ["a&b ü", "", "\ufffd"])

    def test_your_decision_is_what_goes_out(self):
        receiver = self.receiver(functions=CallFunctions(
            on_new_call=lambda event: gather(state=event.from_number), on_dtmf=lambda event: dial("4921100")))
        self.assertEqual(receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL)).body, LIVE_XML[:-4] + (
            b'><Gather onData="https://example.localhost.run/on-data?state=492111234567" maxDigits="1" timeout="2000" />'
            b"</Response>\n"))
        self.assertEqual(receiver.receive("/on-data", DTMF, sign(DTMF)).body,
                         LIVE_XML[:-4] + b"><Dial><Number>4921100</Number></Dial></Response>\n")

    def test_your_code_for_answer_and_hangup_runs_after_the_reply_in_order(self):
        seen = []
        receiver = self.receiver(functions=CallFunctions(on_answer=seen.append, on_hangup=seen.append))
        replies = [receiver.receive("/on-answer", ANSWER, sign(ANSWER)), receiver.receive("/on-hangup", HANGUP, sign(HANGUP))]
        self.assertEqual(seen, [])
        for reply in replies:
            reply.afterwards()
        self.assertEqual(receiver.follow_ups.finish(5), 0)
        self.assertEqual([event.event for event in seen], ["answer", "hangup"])

    def test_an_exact_repeat_is_answered_and_printed_but_runs_and_counts_once(self):
        with tempfile.TemporaryDirectory() as folder:
            for log in (None, CallLog(os.path.join(folder, "calls.db"), 30)):
                seen = []
                receiver = self.receiver(functions=CallFunctions(on_hangup=seen.append))
                receiver.call_log = log
                replies = [receiver.receive(path, body, sign(body)) for path, body in 2 * [
                    ("/new-call", NEW_CALL), ("/on-data", DTMF), ("/on-hangup", HANGUP), ("/on-hangup", HANGUP + b"&a=b")]]
                for reply in replies:
                    reply.afterwards()
                self.assertEqual(receiver.follow_ups.finish(5), 0)
                self.assertEqual((len(seen), len(self.shown), [reply.status for reply in replies]), (2, 8, [200] * 8))
                self.assertEqual([reply.body for reply in replies[:4]], [reply.body for reply in replies[4:]])
            self.assertEqual(log.count(), 5, "each once, but the digit twice")
            trial = self.receiver(TRIAL)
            trial.call_log = log
            for _ in range(2):
                trial.receive("/new-call", NEW_CALL)
            self.assertEqual(log.count(), 7, "in trial mode each one counts")
            log.close(5)

    def test_calls_and_repeats_are_known_again_after_a_restart(self):
        with tempfile.TemporaryDirectory() as folder:
            seen = []
            for _ in range(2):
                log = CallLog(os.path.join(folder, "calls.db"), 30, lambda: 1e9)
                receiver = Receiver(LIVE, [TEST_KEY], CallFunctions(on_hangup=seen.append), clock=lambda: 1e9, call_log=log)
                if not seen:
                    receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL))
                receiver.receive("/on-hangup", HANGUP).afterwards()
                receiver.follow_ups.finish(5)
                log.close(5)
            self.assertEqual(len(seen), 1)

    def test_calls_are_known_again_once_a_log_that_was_locked_can_be_read(self):
        with tempfile.TemporaryDirectory() as folder:
            class Log(CallLog):
                LOCK_SECONDS = RETRY_SECONDS = 0.02

            path = os.path.join(folder, "calls.db")
            log = Log(path, 30)
            Receiver(LIVE, [TEST_KEY], NO_FUNCTIONS, call_log=log).receive("/new-call", NEW_CALL, sign(NEW_CALL))
            log.close(5)
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("PRAGMA locking_mode=EXCLUSIVE")
                other.execute("BEGIN EXCLUSIVE")
                log = Log(path, 30)
                receiver = Receiver(LIVE, [TEST_KEY], NO_FUNCTIONS, call_log=log)
                self.assertEqual(refusal(receiver.receive, "/on-hangup", HANGUP)[0], 403)
            self.assertEqual(receiver.receive("/on-hangup", HANGUP).status, 200)
            log.close(5)

    def test_newcalls_that_nothing_follows_are_spoken_of_once(self):
        for followed in (False, True):
            receiver = self.receiver()
            with diagnostics() as said:
                if followed:
                    receiver.receive("/on-hangup", HANGUP, sign(HANGUP))
                for n in range(sc.FOLLOW_UPS_MISSED + 1):
                    body = b"callId=%d" % n
                    receiver.receive("/new-call", body, sign(body))
            self.assertEqual([line.partition(":")[0] for line in said], [] if followed else ["follow-ups do not arrive"])

    def test_an_error_of_ours_lets_the_call_go_through(self):
        receiver = self.receiver()
        receiver.show = None
        with diagnostics() as said:
            self.assertEqual(receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL)).body, LIVE_XML)
        self.assertIn("an error in this program", said[0])


def raise_system_exit(event):
    sys.exit("not with us")


def recurse(event):
    return recurse(event)


class YourCodeTest(unittest.TestCase):
    """on_new_call and its like may do what they want: the call goes through, in time."""

    def receiver(self, budget=3.0, **functions):
        receiver = Receiver(TRIAL, [], CallFunctions(**functions))
        receiver.reply_budget_seconds = budget
        return receiver

    def test_code_that_raises_is_reported_and_the_call_goes_through(self):
        for function, name in [(lambda event: 1 / 0, "ZeroDivisionError"), (raise_system_exit, "SystemExit"),
                               (recurse, "RecursionError")]:
            receiver = self.receiver(on_new_call=function)
            with self.subTest(name), diagnostics() as said:
                self.assertEqual(receiver.receive("/new-call", NEW_CALL).body, receiver.receive("/new-call", b"").body)
                self.assertIn(f"raised {name}; the call goes through undecided", said[0])
                self.assertIn("test_sipgate_callevents.py", said[0])

    def test_what_is_no_action_is_reported_and_the_call_goes_through(self):
        for result in ("<Response />", 0, [dial("1")], dial):
            receiver = self.receiver(on_new_call=lambda event, result=result: result)
            with self.subTest(result), diagnostics() as said:
                self.assertIn(b"onHangup", receiver.receive("/new-call", NEW_CALL).body)
            self.assertIn(f"returned a {type(result).__name__}, not an action", said[0])

    def test_a_gather_that_has_nowhere_to_go_lets_the_call_go_through(self):
        receiver = Receiver(TRIAL, [TEST_KEY], CallFunctions(on_new_call=lambda event: gather()))
        with diagnostics() as said:
            self.assertEqual(receiver.receive("/new-call", NEW_CALL, sign(NEW_CALL), "abc.lhr.life").body, BARE_XML)
        self.assertIn("gather() without a URL needs WEBHOOK_URL; the call goes through undecided", said)

    def test_late_code_is_reported_and_its_thread_is_free_again_when_it_returns(self):
        go_on, replies = threading.Event(), []
        receiver = self.receiver(0.1, on_new_call=lambda event: go_on.wait(10) and None)
        with diagnostics() as said:
            caught, wheres = [], []
            sc.logger.handlers[-1].addFilter(lambda record: wheres.append(getattr(record, "where", "")) or True)

            def call():
                try:
                    receiver.receive("/new-call", NEW_CALL, when_late=replies.append)
                except sc.Late as late:
                    caught.append(late)

            threads = [threading.Thread(target=call) for _ in range(receiver.decisions.THREADS)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(replies) == len(threads))
            self.assertIn(b"onHangup", replies[0].body)
            wait_until(lambda: said)
            self.assertIn("has not returned in time; the call goes through undecided. It is at", said[0])
            wait_until(lambda: len(said) >= len(threads))
            self.assertIn("go_on.wait(10)", wheres[0])
            began = time.monotonic()
            self.assertIn(b"onHangup", receiver.receive("/new-call", NEW_CALL).body)
            self.assertLess(time.monotonic() - began, 0.05, "the ninth call waits for none of the eight")
            self.assertIn("all 8 threads for your code are busy", said[-1])
            go_on.set()
            for thread in threads:
                thread.join()
        self.assertEqual(len(caught), len(threads))
        receiver.functions = CallFunctions(on_new_call=lambda event: hang_up())
        self.assertIn(b"<Hangup />", receiver.receive("/new-call", NEW_CALL).body)

    def test_a_ninth_call_waits_for_a_thread_while_your_code_is_in_time(self):
        nine, results = threading.Barrier(9), []
        eight = threading.Barrier(8)

        def slow(event):
            eight.wait(5)
            return hang_up()

        receiver = self.receiver(on_new_call=slow)

        def call():
            nine.wait(5)
            results.append(b"<Hangup />" in receiver.receive("/new-call", NEW_CALL).body)

        threads = [threading.Thread(target=call) for _ in range(9)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(results) == 8)
        for _ in range(7):  # so that the ninth finds its seven others
            threading.Thread(target=receiver.receive, args=("/new-call", NEW_CALL)).start()
        began = time.monotonic()
        wait_until(lambda: len(results) == 9)
        self.assertEqual(results, [True] * 9)
        self.assertLess(time.monotonic() - began, 1)

    def test_too_many_events_for_your_slow_code_are_dropped_and_counted(self):
        begun, go_on = threading.Event(), threading.Event()
        follow_ups = sc.FollowUps()
        follow_ups.LIMIT = 2
        with diagnostics() as said:
            follow_ups.put(lambda event: (begun.set(), go_on.wait(10)), HangupEvent())
            begun.wait(10)
            for _ in range(4):
                follow_ups.put(raise_system_exit, HangupEvent())
            self.assertEqual(said, ["raise_system_exit was not run: 2 events wait for your code"])
            self.assertEqual(follow_ups.finish(0.01), 3)
            go_on.set()
            self.assertEqual(follow_ups.finish(5), 0)
        self.assertEqual(len(said), 3, "the two that waited ran")

    def test_scanners_cannot_flood_the_diagnostics(self):
        throttle = sc.Throttle(seconds=0.2)
        with diagnostics() as said:
            for _ in range(5):
                throttle.warn("a", "A")
            throttle.warn("b", "B")
            wait_until(lambda: throttle.warn("a", "A") or len(said) == 3)
        self.assertEqual(said[:2], ["A", "B"])
        self.assertRegex(said[2], r"A \([0-9]+ more since the last message\)")


# ------------------------------------------------------------------------------------------
# HTTP
# ------------------------------------------------------------------------------------------

def request(body=NEW_CALL, *headers, method="POST", target="/new-call", host="localhost"):
    """A request as bytes, with Host and Content-Length."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class Running:
    """A server on a free port, with a short patience."""

    class Handler(WebhookRequestHandler):
        linger_seconds = 0.3
        pipeline_seconds = 0.001

    class Impatient(Handler):
        head_seconds = body_seconds = 0.2
        idle_seconds = 0.4

    def __init__(self, settings=TRIAL, functions=NO_FUNCTIONS, handler=Handler, tls=None, host="127.0.0.1"):
        self.server = WebhookServer(host, 0, settings.base_path, tls)
        self.server.RequestHandlerClass = handler
        self.shown = []
        self.receiver = self.server.receiver = Receiver(settings, [TEST_KEY], functions, lambda event, at: self.shown.append(event))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.server.stop(1)
        self.thread.join()
        self.server.server_close()

    def connect(self):
        connection = socket.create_connection(self.server.server_address[:2], 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def exchange(self, sent, close=True):
        """All that comes back to the bytes `sent`."""
        with self.connect() as connection:
            connection.sendall(sent)
            if close:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def statuses(self, sent, close=True):
        """The status codes that come back to the bytes `sent`."""
        return [int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.exchange(sent, close))]


HOST_LINE = b"Host: localhost\r\n"


class HttpTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.running = Running()
        cls.addClassCleanup(cls.running.stop)

    def assert_statuses(self, rows):
        for label, sent, expected in rows:
            with self.subTest(label):
                self.assertEqual(self.running.statuses(sent), expected)

    def test_request_lines(self):
        self.assert_statuses([(line[:60], line + b"\r\n" + HOST_LINE + b"\r\n", [status] if status else []) for line, status in [
            (b"GET /healthz HTTP/1.1", 200),
            (b"GET /healthz HTTP/1.0", 200),
            (b"GET /healthz?a=b HTTP/1.1", 200),
            (b"HEAD /healthz HTTP/1.1", 200),
            (b"\r\nGET /healthz HTTP/1.1", 200),
            (b"\r\n\r\nGET /healthz HTTP/1.1", 400),
            (b"POST /new-call HTTP/1.1", 200),
            (b"POST /new-call?a=/x HTTP/1.1", 200),
            (b"POST /new%2Dcall HTTP/1.1", 404),
            (b"POST /%2Fnew-call HTTP/1.1", 404),
            (b"POST //new-call HTTP/1.1", 404),
            (b"GET / HTTP/1.1", 405),
            (b"GET /new-call HTTP/1.1", 405),
            (b"PUT /new-call HTTP/1.1", 405),
            (b"POST /healthz HTTP/1.1", 405),
            (b"BREW /teapot HTTP/1.1", 404),
            (b"GET  /healthz HTTP/1.1", 400),
            (b"GET /healthz  HTTP/1.1", 400),
            (b" GET /healthz HTTP/1.1", 400),
            (b"GET /healthz HTTP/1.1 ", 400),
            (b"GET\t/healthz HTTP/1.1", 400),
            (b"GET /healthz HTTP/1.2", 400),
            (b"GET /healthz HTTP/2.0", 400),
            (b"GET /healthz HTTP/01.1", 400),
            (b"GET /healthz http/1.1", 400),
            (b"GET /healthz", 400),
            (b"get /healthz HTTP/1.1", 400),
            (b"ABCDEFGHIJKLMNOPQ /healthz HTTP/1.1", 400),
            (b"GET http://localhost/healthz HTTP/1.1", 400),
            (b"GET healthz HTTP/1.1", 400),
            (b"OPTIONS * HTTP/1.1", 400),
            (b"CONNECT localhost:80 HTTP/1.1", 400),
            (b"GET /health\0z HTTP/1.1", 400),
            (b"GET /health\xffz HTTP/1.1", 400),
            (b"GET /" + b"a" * (8192 - 14) + b" HTTP/1.1", 404),
            (b"GET /" + b"a" * (8192 - 13) + b" HTTP/1.1", 414),
        ]])

    def test_header_lines(self):
        many = [b"A: b\r\n" * n for n in (63, 64)]
        wide = [b"A: " + b"b" * n + b"\r\n" for n in (8189, 8190)]
        self.assert_statuses([(repr(lines[:60]), b"GET /healthz HTTP/1.1\r\n" + HOST_LINE + lines + b"\r\n", [status])
                              for lines, status in [
            (b"", 200),
            (b"A: \xe4\tb\r\n", 200),
            (b"A:\r\n", 200),
            (b"A:b\r\nA: c\r\n", 200),
            (b"!#$%&'*+-.^_`|~: b\r\n", 200),
            (b"A" * 64 + b": b\r\n", 200),
            (b"A" * 65 + b": b\r\n", 400),
            (b"A: b\n", 400),
            (b"A: b\rC: d\r\n", 400),
            (b"A: b\r\r\n", 400),
            (b" A: b\r\n", 400),
            (b"A: b\r\n c\r\n", 400),
            (b"A: b\r\n\tc\r\n", 400),
            (b"A b\r\n", 400),
            (b"A : b\r\n", 400),
            (b": b\r\n", 400),
            (b"A\xe4: b\r\n", 400),
            (b"A(: b\r\n", 400),
            (b"A: b\0\r\n", 400),
            (b"A: b\x0b\r\n", 400),
            (b"A: b\x7f\r\n", 400),
            (b"Content-Length: 0\x0c\r\n", 400),
            (many[0], 200),
            (many[1], 431),
            (wide[0], 200),
            (wide[1], 431),
            (wide[0] * 3, 200),
            (wide[0] * 4, 431),
            (HOST_LINE, 400),
            (b"Expect: 100-continue\r\nExpect: 100-continue\r\n", 400),
            (b"Content-Type: a/b\r\nContent-Type: a/b\r\n", 400),
            (b"X-Sipgate-Signature: a\r\nX-SIPGATE-Signature: a\r\n", 400),
            (b"Content-Length: 0\r\nContent-Length: 0\r\n", 400),
            (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
            (b"X-Forwarded-For: 1\r\nX-Forwarded-For: 2\r\n", 200),
        ]])

    def test_the_host(self):
        self.assert_statuses([(repr(line), b"GET /healthz HTTP/1." + minor + b"\r\n" + line + b"\r\n", [status])
                              for minor, line, status in [
            (b"1", b"Host: a\r\n", 200),
            (b"1", b"Host: a-b.example:8080\r\n", 200),
            (b"1", b"Host: [::1]:8080\r\n", 200),
            (b"1", b"", 400),
            (b"0", b"", 200),
            (b"1", b"Host:\r\n", 400),
            (b"0", b"Host:\r\n", 400),
            (b"1", b"Host: a b\r\n", 400),
            (b"1", b"Host: a, b\r\n", 400),
            (b"1", b"Host: a/b\r\n", 400),
            (b"1", b"Host: me@a\r\n", 400),
            (b"1", b"Host: a:\r\n", 400),
            (b"1", b"Host: a:b\r\n", 400),
            (b"1", b"Host: ::1\r\n", 400),
        ]])

    def test_body_lengths(self):
        post, body = b"POST /new-call HTTP/1.1\r\n" + HOST_LINE, b"callId=1"
        self.assert_statuses([(repr(lines), post + lines + b"\r\n" + rest, status) for lines, rest, status in [
            (b"Content-Length: 8\r\n", body, [200]),
            (b"Content-Length:8 \t\r\n", body, [200]),
            (b"Content-Length: 000000008\r\n", body, [200]),
            (b"", b"", [200]),
            (b"Content-Length: 0\r\n", b"", [200]),
            (b"Content-Length: 0000000008\r\n", body, [400]),
            (b"Content-Length: +8\r\n", body, [400]),
            (b"Content-Length: -8\r\n", body, [400]),
            (b"Content-Length: 8_0\r\n", body, [400]),
            (b"Content-Length: 8, 8\r\n", body, [400]),
            (b"Content-Length: 8 8\r\n", body, [400]),
            (b"Content-Length: 0x8\r\n", body, [400]),
            (b"Content-Length: \xb2\r\n", body, [400]),
            (b"Content-Length:\r\n", body, [400]),
            (b"Content-Length: 8\r\nTransfer-Encoding: chunked\r\n", body, [400]),
            (b"Transfer-Encoding: gzip\r\n", b"", [501]),
            (b"Content-Length: 65536\r\n", b"callId=1&a=" + b"b" * 65525, [200]),
            (b"Content-Length: 65537\r\n", b"callId=1&a=" + b"b" * 65526, [413]),
            (b"Content-Length: 999999999\r\n", body, [413]),
            (b"Content-Length: 9\r\n", body, []),
        ]])
        self.assert_statuses([(method, request(b"a=b", method=method, target="/healthz"), [400]) for method in ("GET", "HEAD")])
        self.assertEqual(self.running.statuses(request(b"a=b", method="PUT")), [405])

    def test_chunked_bodies(self):
        post, good = b"POST /new-call HTTP/1.1\r\n" + HOST_LINE, b"Transfer-Encoding: chunked\r\n"
        wide = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
        self.assert_statuses([(repr(rest[:50]), post + lines + b"\r\n" + rest, status) for lines, rest, status in [
            (good, b"8\r\ncallId=1\r\n0\r\n\r\n", [200]),
            (good, b"5\r\ncallI\r\n000003\r\nd=1\r\n0\r\n\r\n" + request(), [200, 200]),
            (b"transfer-encoding:Chunked \r\n", b"A\r\ncallId=123\r\n0\r\n\r\n", [200]),
            (good, b"0\r\n\r\n", [200]),
            (good, b"0\r\n\r", []),
            (good, b"8\r\ncallId=1\r\n", []),
            (good, b"8;a=b\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"8 \r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b" 8\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"0x8\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"+8\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"0000008\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"\r\n", [400]),
            (good, b"8\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"8\r\ncallId=1\n0\r\n\r\n", [400]),
            (good, b"7\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"9\r\ncallId=1\r\n0\r\n\r\n", [400]),
            (good, b"0\r\nTrailer: a\r\n\r\n", [400]),
            (good, wide * 2 + b"0\r\n\r\n", [400]),  # no form, but no longer than allowed
            (good, wide * 2 + b"1\r\na\r\n0\r\n\r\n", [413]),
            (good, b"10001\r\n", [413]),
            (good, b"1\r\na\r\n" * 30_000 + b"0\r\n\r\n", [413]),
            (good + b"Content-Length: 5\r\n", b"0\r\n\r\n", [400]),
            (b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n", [501]),
            (b"Transfer-Encoding: identity\r\n", b"", [501]),
            (b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n", [501]),
            (b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n", [400]),
            (b"Transfer-Encoding:\r\n", b"", [501]),
        ]])
        chunked = b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        self.assert_statuses([(line, line + b"\r\n" + HOST_LINE + chunked, [400]) for line in (
            b"POST /new-call HTTP/1.0", b"GET /healthz HTTP/1.1", b"HEAD /healthz HTTP/1.1", b"PUT /new-call HTTP/1.1")])

    def test_expectations(self):
        def expect(line, target="/new-call", expectation="100-continue", length=8):
            return (f"{line.format(target)}\r\nHost: localhost\r\nExpect: {expectation}\r\n"
                    f"Content-Length: {length}\r\n\r\n").encode()

        post = "POST {} HTTP/1.1"
        for label, sent, expected in [
                ("goes on", expect(post), [100, 200]),
                ("any case", expect(post, expectation="100-Continue"), [100, 200]),
                ("1.0 is not asked", expect("POST {} HTTP/1.0"), [200]),
                ("unknown path", expect(post, "/none"), [404]),
                ("wrong method", expect("PUT {} HTTP/1.1"), [405]),
                ("too long", expect(post, length=70_000), [413]),
                ("another", expect(post, expectation="200-ok"), [417])]:
            with self.subTest(label):
                self.assertEqual(self.running.statuses(sent + b"callId=1"), expected)
        with self.running.connect() as connection:
            connection.sendall(expect(post))
            self.assertEqual(connection.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(b"callId=1")
            self.assertTrue(connection.recv(100).startswith(b"HTTP/1.1 200 "))

    def test_a_request_hidden_in_a_body_is_never_answered(self):
        chance, hidden = random.Random(6), b"POST /on-hangup HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\ncallId=H"
        body = b"0\r\n\r\n" + hidden
        coding, length = b"Transfer-Encoding: chunked\r\n", b"Content-Length: %d\r\n" % len(body)

        def mutated(line, begin):
            line = bytearray(line)
            for _ in range(chance.randrange(1, 4)):
                # None of these makes the length that of the first chunk alone, which would be another good request.
                line[chance.randrange(begin, len(line))] = chance.choice(b" \t\r\n\0\x0b,;:x_+-\xff\xb2C678")
            return bytes(line)

        before = len(self.running.shown)
        for _ in range(2000):
            lines = [mutated(coding, 0), length if chance.random() < 0.5 else mutated(length, 15)]
            chance.shuffle(lines)
            self.running.exchange(b"POST /new-call HTTP/1.1\r\n" + HOST_LINE + b"".join(lines) + b"\r\n" + body)
        self.assertEqual([event for event in self.running.shown[before:] if isinstance(event, HangupEvent)], [])

    def test_requests_in_two_segments_get_the_same_reply(self):
        chunked = b"POST /new-call HTTP/1.1\r\n" + HOST_LINE + b"Transfer-Encoding: chunked\r\n\r\n8\r\ncallId=1\r\n0\r\n\r\n"
        for sent in (request(b"a=b"), chunked, b"\r\nGET /healthz HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nA : b\r\n\r\n"):
            whole = self.running.statuses(sent)
            for cut in range(1, len(sent)):
                with self.running.connect() as connection:
                    connection.sendall(sent[:cut])
                    connection.sendall(sent[cut:])
                    connection.shutdown(socket.SHUT_WR)
                    reply = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
                    self.assertEqual([int(reply[9:12])], whole, sent[:cut])

    def test_a_refusal_finds_nothing_unread(self):
        for target, status in [("/unknown", 404), ("/healthz", 405)]:
            self.assertEqual(self.running.statuses(request(b"a=b" * 9000, target=target) + request()), [status, 200])

    def test_a_large_refused_body_still_gets_its_reply(self):
        body = b"a" * 2_000_000
        self.assertEqual(self.running.statuses(request(body)), [413])

    def test_pipelined_requests_are_answered_in_order(self):
        sent = request() + request(target="/none") + request(ANSWER, target="/on-answer") + request(b"x")
        self.assertEqual(self.running.statuses(sent), [200, 404, 200, 400])

    def test_close_and_http_1_0_end_the_connection(self):
        for head in (b"POST /new-call HTTP/1.1\r\nConnection: close\r\n", b"POST /new-call HTTP/1.0\r\n",
                     b"POST /new-call HTTP/1.1\r\nConnection: keep-alive, CLOSE\r\n",
                     b"POST /new-call HTTP/1.0\r\nConnection: keep-alive\r\n",
                     b"POST /new-call HTTP/1.1\r\nConnection: keep-alive\r\nConnection: close\r\n"):
            reply = self.running.exchange(head + HOST_LINE + b"\r\n" + request())
            self.assertEqual((reply.count(b"HTTP/1.1 200 "), b"Connection: close" in reply), (1, True), head)

    def test_what_is_left_behind_a_refusal_is_not_taken_for_a_request(self):
        self.assertEqual(self.running.statuses(b"GET / HTTP/1.1\r\n\r\n" + request()), [400])

    def test_a_reply_is_complete_and_names_no_software(self):
        head, _, body = self.running.exchange(request()).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.assertEqual(lines[0], "HTTP/1.1 200 OK")
        self.assertRegex(lines[1], r"^Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT$")
        self.assertEqual(lines[2:], ["Content-Type: application/xml", f"Content-Length: {len(body)}"])
        reply = self.running.exchange(request(HANGUP, target="/on-hangup"))
        self.assertIn(b"\r\nContent-Type: text/plain", reply)
        self.assertTrue(reply.endswith(b"\r\n\r\nThis response will be discarded"))

    def test_the_wrong_method_is_told_the_right_one(self):
        self.assertRegex(self.running.exchange(request(b"", method="GET")),
                         rb"(?s)HTTP/1.1 405 .*\r\nAllow: POST\r\n\r\ntakes POST from sipgate\n\Z")
        self.assertIn(b"\r\nAllow: GET, HEAD\r\n", self.running.exchange(request(target="/healthz")))

    def test_health(self):
        head, _, body = self.running.exchange(request(b"", method="GET", target="/healthz")).partition(b"\r\n\r\n")
        self.assertEqual(body, b"ok\n")
        self.assertIn(f"\r\nX-Instance: {self.running.server.instance}\r\n".encode(), head)
        before = int(re.search(rb"X-Refused: (\d+)", head)[1])
        self.assertEqual(self.running.statuses(request(NEW_CALL, "X-Sipgate-Signature: x")), [403])
        self.assertIn(b"\r\nX-Refused: %d\r\n" % (before + 1), self.running.exchange(request(b"", method="GET", target="/healthz")))
        self.assertTrue(self.running.exchange(request(b"", method="HEAD", target="/healthz")).endswith(b"\r\n\r\n"))

    def test_no_text_of_the_request_comes_back_in_a_head(self):
        for sent in (request(method="EVIL"), request(target="/EVIL"), request(b"", "EVIL: EVIL"), b"EVIL\r\n\r\n",
                     request(b"event=EVIL&EVIL=1&EVIL=2")):
            self.assertNotIn(b"EVIL", self.running.exchange(sent))

    def test_a_page_of_another_site_cannot_play_sipgate(self):
        for header in ("Origin: https://evil.example", "X-Forwarded-For: 1.2.3.4", "Via: 1.1 x", "Forwarded: for=1.2.3.4",
                       "X-Real-IP: 1.2.3.4", "Sec-Fetch-Site: cross-site", "CF-Connecting-IP: 1.2.3.4"):
            self.assertEqual(self.running.statuses(request(NEW_CALL, header)), [403], header)
        self.assertEqual(self.running.statuses(request(host="abc.lhr.life")), [403])
        self.assertEqual(self.running.statuses(b"POST /new-call HTTP/1.0\r\n\r\n"), [403])

    def test_a_tunnel_is_answered_if_sipgate_signed(self):
        with diagnostics() as said:
            sent = request(NEW_CALL, "X-Sipgate-Signature: " + sign(NEW_CALL), "X-Forwarded-For: 1.2.3.4", host="abc.lhr.life")
            self.assertTrue(self.running.exchange(sent).endswith(BARE_XML))
        self.assertTrue(any("restart with --url https://abc.lhr.life" in line for line in said) or
                        "outside" in self.running.receiver.throttle._said)

    def test_the_captured_request_of_the_documentation_is_taken(self):
        head = ("POST / HTTP/1.1\r\nAccept: application/xml, text/plain, text/html\r\nAccept-Charset: utf-8\r\n"
                "User-Agent: sipgate.io\r\nX-SIPGATE-JOBS: http://www.sipgate.de/jobs\r\nContent-Length: 84\r\n"
                "Content-Type: application/x-www-form-urlencoded; charset=UTF-8\r\nAccept-Encoding: gzip,deflate\r\n"
                "Host: gwen.fuglu.net:3000\r\nVia: 1.1 localhost (squid/3.1.20)\r\nX-Forwarded-For: 217.10.77.113\r\n"
                "Cache-Control: max-age=259200\r\nConnection: keep-alive\r\n")
        body = b"event=newCall&direction=in&from=anonymous&to=445603000514&callId=4932215337270853042"
        signed = f"{head}X-Sipgate-Signature: {sign(body)}\r\n\r\n".encode()
        with self.running.connect() as connection:  # in two segments, as it came
            connection.sendall(signed)
            connection.sendall(body)
            self.assertEqual(connection.recv(12), b"HTTP/1.1 200")

    def test_requests_cut_at_any_byte_get_the_same_verdict(self):
        heads = [request(b"a=b"), request(b"", method="GET"), b"GET / HTTP/1.1\r\nHost: a\r\nA: b\rc\r\n\r\n",
                 b"\r\nGET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\nHost: a\n\n", b"GET / HTTP/1.1\r\nA b\r\n\r\n",
                 b"GET /" + b"a" * 9000 + b"\rb", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 65 + b"\r\n", b"\r\n\r\n",
                 b"GET / HTTP/1.1\r\n" + (b"A: " + b"b" * 8000 + b"\r\n") * 5, b"GET / HTTP/1.1\r\nHost: a\r\n\n"]

        def verdict(received):
            try:
                return parse_head(received)
            except WebhookError as error:
                return error.status, error.reason

        for head in heads:
            with self.subTest(head[:40]):
                whole = verdict(head)
                cuts = range(0, len(head) + 1, 1 if len(head) < 1000 else 13)
                first = next((found for found in (verdict(head[:n]) for n in cuts) if found), verdict(head))
                self.assertEqual(first, whole)

    def test_any_head_gives_a_value_or_the_documented_error(self):
        chance = random.Random(4)
        good = request(NEW_CALL, "Content-Type: a/b", "X-Forwarded-For: 1", "Connection: close").partition(b"event")[0]
        for _ in range(5000):
            head = bytearray(good)
            for _ in range(chance.randrange(1, 5)):
                head[chance.randrange(len(head))] = chance.choice(b"\r\n\0 :\t\x7f\xffA1/,")
            with contextlib.suppress(WebhookError):
                found = parse_head(bytes(head))
                if found:
                    sc.body_length(found)
                    sc.outside_host(found.headers)

    def test_a_tls_hello_is_closed_with_a_message(self):
        with diagnostics() as said:
            self.assertEqual(self.running.exchange(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", close=False), b"")
        self.assertEqual(said, ["https on the http port: a TLS handshake came in; the tunnel or proxy must speak http to this port"])

    def test_names_and_ipv6_can_be_listened_on(self):
        for host in ("localhost", "::1"):
            try:
                running = Running(host=host)
            except OSError:  # a machine without IPv6
                self.assertEqual(host, "::1")
                continue
            try:
                self.assertEqual(running.statuses(request(host="[::1]:8080")), [200])
            finally:
                running.stop()

    def test_clients_that_go_away_leave_no_trace(self):
        with diagnostics() as said:
            for sent in (b"", b"POST", request()[:-5], request()[:40]):
                self.assertEqual(self.running.exchange(sent), b"")
            for _ in range(20):
                with self.running.connect() as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                    connection.sendall(request() * 3)
            wait_until(lambda: not self.running.server._connections)
        self.assertEqual(said, [])
        self.assertEqual(self.running.statuses(request()), [200])

    def test_a_wrong_content_type_is_taken_with_a_warning(self):
        with diagnostics() as said:
            self.running.receiver.throttle._said.clear()
            self.assertEqual(self.running.statuses(request(NEW_CALL, "Content-Type: text/plain")), [200])
            self.assertEqual(self.running.statuses(
                request(NEW_CALL, "content-type: Application/X-www-form-urlencoded;charset=UTF-8")), [200])
        self.assertEqual(said, ["a webhook came without Content-Type: application/x-www-form-urlencoded; sipgate sends one"])


class TimeLimitTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.running = Running(handler=Running.Impatient)
        cls.addClassCleanup(cls.running.stop)

    def test_a_slow_head_is_told_so(self):
        self.assertEqual(self.running.statuses(b"POST /new-call HT", close=False), [408])

    def test_a_slow_body_is_told_so_and_recorded_nowhere(self):
        self.assertEqual(self.running.statuses(request()[:-1], close=False), [408])
        self.assertEqual(self.running.shown, [])

    def test_a_byte_now_and_then_does_not_stretch_the_limit(self):
        began = time.monotonic()
        with self.running.connect() as connection, contextlib.suppress(OSError):
            for byte in request():
                connection.sendall(bytes([byte]))
                threading.Event().wait(0.02)
        self.assertLess(time.monotonic() - began, 2)

    def test_the_limit_of_a_second_head_begins_with_its_first_byte(self):
        with self.running.connect() as connection:
            connection.sendall(request())
            connection.recv(65536)
            connection.sendall(b"POST ")
            began = time.monotonic()
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 408 "))
            self.assertLess(time.monotonic() - began, 0.5)

    def test_who_says_nothing_is_closed_without_a_word(self):
        self.assertEqual(self.running.exchange(b"", close=False), b"")

    def test_who_pipelines_is_made_to_wait(self):
        class Slow(Running.Handler):
            pipeline_seconds = 0.1

        running = Running(handler=Slow)
        self.addCleanup(running.stop)
        began = time.monotonic()
        self.assertEqual(running.statuses(request() * 4), [200] * 4)
        self.assertGreater(time.monotonic() - began, 0.3)

    def test_an_idle_connection_is_kept_for_a_while(self):
        with self.running.connect() as connection:
            connection.sendall(request())
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200"))
            began = time.monotonic()
            self.assertEqual(connection.recv(65536), b"")
            self.assertGreater(time.monotonic() - began, 0.35)

    def test_a_reply_that_nobody_takes_ends_the_connection(self):
        class Stubborn(Running.Handler):
            reply_seconds, pipeline_seconds = 0.2, 0

            def setup(self):
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                super().setup()

        running = Running(handler=Stubborn)
        self.addCleanup(running.stop)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(running.server.server_address)
            connection.settimeout(0.5)
            with contextlib.suppress(OSError):
                for _ in range(10_000):
                    connection.sendall(request(b"", method="GET", target="/healthz") * 100)
            wait_until(lambda: not running.server._connections)


class CapTest(unittest.TestCase):
    def setUp(self):
        self.go_on = threading.Event()
        self.running = Running(functions=CallFunctions(
            on_new_call=lambda event: self.go_on.wait(10) and None if event.call_id == "slow" else None))
        self.running.server.max_connections = 4
        self.addCleanup(self.running.stop)
        self.addCleanup(self.go_on.set)
        self.opened = []

    def connect(self, sent=b""):
        before = len(self.running.server._connections)
        connection = self.running.connect()
        self.opened.append(connection)
        self.addCleanup(connection.close)
        connection.sendall(sent)
        wait_until(lambda: len(self.running.server._connections) > before)
        return connection

    def test_the_longest_waiting_connection_makes_room(self):
        first, second, third = self.connect(), self.connect(b"POST /new"), self.connect(request())
        self.connect()
        self.assertTrue(third.recv(65536).startswith(b"HTTP/1.1 200 "))
        self.assertEqual(self.running.statuses(request()), [200])
        self.assertEqual(first.recv(1), b"")
        second.sendall(request()[9:])
        self.assertTrue(second.recv(65536).startswith(b"HTTP/1.1 200 "))

    def test_a_connection_that_was_cut_is_never_served(self):
        server = self.running.server
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        connection = sc.Connection(ours)
        connection.cut()
        self.assertFalse(server.begin(connection))
        self.assertFalse(server.switch(connection, ours))

    def test_what_is_in_flight_is_never_chosen(self):
        busy = [self.connect(request(b"callId=slow")) for _ in range(4)]
        wait_until(lambda: len(self.running.shown) == 4)
        with self.running.connect() as waiting:
            waiting.sendall(request())
            waiting.settimeout(0.2)
            with self.assertRaises(socket.timeout):
                waiting.recv(1)
            self.go_on.set()
            for connection in busy:
                self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 "))
            waiting.settimeout(10)
            self.assertTrue(waiting.recv(65536).startswith(b"HTTP/1.1 200 "))

    def test_connections_that_are_lost_to_your_code_do_not_count(self):
        self.running.receiver.reply_budget_seconds = 0.05
        for connection in [self.connect(request(b"callId=slow")) for _ in range(4)]:
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 "))
        self.assertEqual(self.running.statuses(request()), [200])

    def test_idle_connections_lock_nobody_out(self):
        idle = [self.running.connect() for _ in range(40)]
        for connection in idle:
            self.addCleanup(connection.close)
        began = time.monotonic()
        self.assertEqual(self.running.statuses(request()), [200])
        self.assertLess(time.monotonic() - began, 1)
        self.assertLessEqual(len(self.running.server._connections), 5)


class TlsTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.paths = [os.path.join(self.folder, name) for name in ("cert.pem", "key.pem")]
        self.write(*CERTIFICATES[0])
        self.tls = sc.TlsFiles(*self.paths)
        self.tls.CHECK_SECONDS = 0
        self.running = Running(tls=self.tls, handler=Running.Impatient)
        self.addCleanup(self.running.stop)

    def write(self, *texts):
        for path, text in zip(self.paths, texts):
            with open(path, "w", encoding="ascii") as file:
                file.write(text)

    def exchange(self, sent, certificate=0):
        """All that comes back to the bytes `sent`, if the server has that certificate."""
        context = ssl.create_default_context(cadata=CERTIFICATES[certificate][0])
        with self.running.connect() as connection, context.wrap_socket(connection, server_hostname="localhost") as tls:
            tls.sendall(sent)
            return tls.recv(65536)

    def test_a_webhook_over_https(self):
        for _ in range(2):
            self.assertTrue(self.exchange(request()).startswith(b"HTTP/1.1 200 "))
        self.assertTrue(self.exchange(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 "))
        with contextlib.suppress(ssl.SSLError):  # too slow; OpenSSL 3 leaves no way for a 408
            self.assertIn(self.exchange(b"POST ")[:12], (b"", b"HTTP/1.1 408"))

    def test_http_on_the_https_port_is_told_so(self):
        with diagnostics() as said:
            self.assertTrue(self.running.exchange(request()).endswith(b"this port speaks https\n"))
        self.assertEqual(said, ["http on the https port: a plain request came in; the tunnel or proxy must speak https to "
                                "this port, or leave out WEBHOOK_TLS_CERT"])

    def test_silent_connections_hold_up_nobody_and_are_closed(self):
        silent = [self.running.connect() for _ in range(50)]
        for connection in silent:
            self.addCleanup(connection.close)
        silent[1].sendall(b"\x16\x03\x01")
        began = time.monotonic()
        self.assertTrue(self.exchange(request()).startswith(b"HTTP/1.1 200 "))
        self.assertLess(time.monotonic() - began, 0.3)
        for connection in silent[:2]:
            with contextlib.suppress(ConnectionResetError):
                self.assertIn(connection.recv(65536)[:1], (b"", b"\x15"))  # an alert, at most
        wait_until(lambda: not self.running.server._connections)

    def test_a_renewed_pair_is_picked_up(self):
        self.write(*CERTIFICATES[1])
        self.assertTrue(self.exchange(request(), 1).startswith(b"HTTP/1.1 200 "))

    def test_a_pair_that_does_not_match_leaves_the_old_one_in_use(self):
        self.write(CERTIFICATES[1][0])
        with diagnostics() as said:
            for _ in range(2):
                self.assertTrue(self.exchange(request()).startswith(b"HTTP/1.1 200 "))
        self.assertEqual(len([line for line in said if "cannot be used with its key" in line]), 1)
        os.remove(self.paths[0])
        self.assertTrue(self.exchange(request()).startswith(b"HTTP/1.1 200 "))
        self.write(*CERTIFICATES[1])
        self.assertTrue(self.exchange(request(), 1).startswith(b"HTTP/1.1 200 "))

    def test_a_pair_that_cannot_be_used_is_named(self):
        for texts in ((CERTIFICATES[1][0], CERTIFICATES[0][1]), ("", "")):
            self.write(*texts)
            with self.assertRaises(SettingsError) as caught:
                sc.TlsFiles(*self.paths)
            self.assertIn("expected a PEM certificate (with its chain) and the key that belongs to it", str(caught.exception))

    def test_old_protocols_are_refused(self):
        self.assertEqual(self.tls.context().minimum_version, ssl.TLSVersion.TLSv1_2)


class YourCodeOverHttpTest(unittest.TestCase):
    def test_code_that_returns_just_when_it_is_late_leaves_no_call_without_a_reply(self):
        def return_when_late(event):
            while not running.receiver.decisions._lost:
                time.sleep(0)

        running = Running(functions=CallFunctions(on_new_call=return_when_late))
        running.receiver.reply_budget_seconds = 0.01
        self.addCleanup(running.stop)
        self.assertEqual([running.statuses(request()) for _ in range(20)], [[200]] * 20)

    def test_on_hangup_runs_after_the_reply_even_if_nobody_takes_it(self):
        seen, replied = [], threading.Event()
        running = Running(functions=CallFunctions(on_hangup=lambda event: seen.append(replied.wait(10))))
        self.addCleanup(running.stop)
        self.assertEqual(running.statuses(request(HANGUP, target="/on-hangup")), [200])
        replied.set()
        wait_until(lambda: seen == [True])
        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(request(HANGUP, target="/on-hangup") * 2)
        wait_until(lambda: len(seen) > 1)

    def test_an_error_whose_text_takes_forever_is_cut_off_too(self):
        go_on = threading.Event()

        class Slow(Exception):
            def __str__(self):
                return str(go_on.wait(10))

        def raise_slow(event):
            raise Slow

        running = Running(functions=CallFunctions(on_new_call=raise_slow))
        running.receiver.reply_budget_seconds = 0.1
        self.addCleanup(running.stop)
        self.addCleanup(go_on.set)
        self.addCleanup(sc.logger.handlers[0].setFormatter, None)
        listener = logging.StreamHandler(io.StringIO())
        sc.logger.addHandler(listener)
        self.addCleanup(sc.logger.removeHandler, listener)
        began = time.monotonic()
        self.assertEqual(running.statuses(request()), [200])
        self.assertLess(time.monotonic() - began, 2)

    def test_late_code_costs_its_own_caller_the_budget_and_nobody_else_anything(self):
        go_on = threading.Event()
        running = Running(functions=CallFunctions(on_new_call=lambda event: event.call_id == "slow" and go_on.wait(10) and None or None))
        running.receiver.reply_budget_seconds = 0.5
        self.addCleanup(running.stop)
        self.addCleanup(go_on.set)
        with running.connect() as slow:
            began = time.monotonic()
            slow.sendall(request(b"callId=slow"))
            wait_until(lambda: running.shown)
            self.assertEqual(running.statuses(request()), [200])
            self.assertLess(time.monotonic() - began, 0.4, "the next call is served at once")
            reply = b"".join(iter(lambda: slow.recv(65536), b""))
            self.assertLess(time.monotonic() - began, 0.7)
        self.assertIn(b"\r\nConnection: close\r\n", reply)
        self.assertIn(b"<Response onAnswer=", reply)
        go_on.set()
        wait_until(lambda: not running.server._connections)
        self.assertEqual(running.statuses(request()), [200])

    def test_a_signed_call_and_its_unsigned_hangup_go_through_end_to_end(self):
        seen = []
        running = Running(LIVE, CallFunctions(on_hangup=seen.append))
        self.addCleanup(running.stop)
        self.assertEqual(running.statuses(request(HANGUP, target="/on-hangup")), [403])
        self.assertEqual(running.statuses(request()), [403])
        self.assertTrue(running.exchange(request(NEW_CALL, "X-Sipgate-Signature: " + sign(NEW_CALL))).endswith(LIVE_XML))
        self.assertEqual(running.statuses(request(HANGUP, target="/on-hangup")), [200])
        wait_until(lambda: seen)
        self.assertEqual([event.event for event in running.shown], ["newCall", "hangup"])

    def test_at_a_stop_what_is_in_flight_is_answered_and_the_rest_closed(self):
        go_on = threading.Event()
        running = Running(functions=CallFunctions(on_new_call=lambda event: go_on.wait(10) and None))
        with running.connect() as busy, running.connect() as idle, running.connect() as late:
            busy.sendall(request())
            wait_until(lambda: running.shown and len(running.server._connections) == 3)
            stopping = threading.Thread(target=running.server.stop, args=(5,))
            stopping.start()
            self.assertEqual(idle.recv(1), b"")
            wait_until(lambda: running.server.stopping)
            self.assertEqual(running.statuses(request(b"", method="GET", target="/healthz")), [503])
            go_on.set()
            self.assertTrue(busy.recv(65536).startswith(b"HTTP/1.1 200"))
            self.assertEqual(late.recv(1), b"")
            stopping.join()
        running.thread.join()
        running.server.server_close()


# ------------------------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------------------------

def flow(*events):
    """Rows of events from (seconds, event, leg, further fields as a form)."""
    return [(1e9 + at, event, leg, f"event={event}&callId={leg}&{form}".encode()) for at, event, leg, form in events]


IN = "direction=in&from=4921100&to=4930200&user[]=Alice&user[]=Bob"
OUT = "direction=out&from=4930200&to=4921100&user[]=Alice"
VOICEMAIL = "direction=in&from=4921100&to=4930200&user[]=voicemail&diversion=4930200"
ALICE = "user=Alice&answeringNumber=4930201"

FLOWS = {  # name: events, then direction, users, answered by, wait, talk, outcome, cause, digits, legs; a row for each call
    "answered": (flow((0, "newCall", "A", IN), (4, "answer", "A", ALICE), (96, "hangup", "A", "cause=normalClearing")),
                 ("in", "Alice Bob", "Alice", 4, 92, "answered", "normalClearing", "", "A")),
    "answered by another phone": (flow((0, "newCall", "A", IN), (4, "answer", "A", "answeringNumber=4930209"),
                                       (6, "hangup", "A", "cause=normalClearing")),
                                  ("in", "Alice Bob", "4930209", 4, 2, "answered", "normalClearing", "", "A")),
    "queue": (flow((0, "newCall", "A", "direction=in&from=4921100&to=4930200"), (1, "answer", "A", ""),
                   (9, "hangup", "A", "cause=normalClearing")),
              ("in", "", "", 1, 8, "answered", "normalClearing", "", "A")),
    "caller gives up": (flow((0, "newCall", "A", IN), (21, "hangup", "A", "cause=cancel")),
                        ("in", "Alice Bob", "", 21, None, "missed", "cancel", "", "A")),
    "busy": (flow((0, "newCall", "A", IN), (1, "hangup", "A", "cause=busy")),
             ("in", "Alice Bob", "", 1, None, "missed", "busy", "", "A")),
    "declined": (flow((0, "newCall", "A", IN), (2, "hangup", "A", "cause=noAnswer")),
                 ("in", "Alice Bob", "", 2, None, "missed", "noAnswer", "", "A")),
    "cleared without an answer": (flow((0, "newCall", "A", IN), (2, "hangup", "A", "cause=normalClearing")),
                                  ("in", "Alice Bob", "", 2, None, "missed", "normalClearing", "", "A")),
    "outgoing, answered": (flow((0, "newCall", "A", OUT), (5, "answer", "A", ""), (9, "hangup", "A", "cause=normalClearing")),
                           ("out", "Alice", "", 5, 4, "answered", "normalClearing", "", "A")),
    "outgoing, not answered": (flow((0, "newCall", "A", OUT), (5, "hangup", "A", "cause=noAnswer")),
                               ("out", "Alice", "", 5, None, "unanswered", "noAnswer", "", "A")),
    "forwarded to voicemail": (flow(
        (0, "newCall", "A", IN + "&xcid=ab&origCallId=A"), (21.5, "hangup", "A", "cause=forwarded&xcid=ab"),
        (21.6, "newCall", "B", VOICEMAIL + "&xcid=ab&origCallId=A"), (21.9, "answer", "B", "xcid=ab&user=voicemail"),
        (30, "hangup", "B", "cause=normalClearing&xcid=ab")),
        ("in", "Alice Bob", "", 30, None, "voicemail", "normalClearing", "", "A B")),
    "voicemail that does not say so": (flow(
        (0, "newCall", "A", IN + "&xcid=ab"), (21.5, "hangup", "A", "cause=forwarded"), (21.6, "newCall", "B", VOICEMAIL + "&xcid=ab"),
        (21.9, "answer", "B", ""), (30, "hangup", "B", "cause=normalClearing")),
        ("in", "Alice Bob", "", 30, None, "voicemail", "normalClearing", "", "A B")),
    "forwarded and nothing more": (flow((0, "newCall", "A", IN), (9, "hangup", "A", "cause=forwarded")),
                                   ("in", "Alice Bob", "", 9, None, "forwarded", "forwarded", "", "A")),
    "transfer, picked up": (flow(
        (0, "newCall", "A", IN + "&origCallId=A"), (3, "answer", "A", ALICE),
        (20, "newCall", "B", "direction=in&from=4930201&to=4930203&user[]=Carl&origCallId=A&diversion=4930201"),
        (25, "answer", "B", "user=Carl"), (40, "hangup", "A", "cause=normalClearing"), (90, "hangup", "B", "cause=normalClearing")),
        ("in", "Alice Bob Carl", "Alice", 3, 87, "answered", "normalClearing", "", "A B")),
    "transfer, not picked up": (flow(
        (0, "newCall", "A", IN + "&xcid=cd"), (3, "answer", "A", ALICE), (20, "newCall", "B", "direction=in&user[]=Carl&xcid=cd"),
        (30, "hangup", "B", "cause=cancel&xcid=cd"), (40, "hangup", "A", "cause=normalClearing&xcid=cd")),
        ("in", "Alice Bob Carl", "Alice", 3, 37, "answered", "normalClearing", "", "A B")),
    "transfer, origCallId wrong but xcid right": (flow(
        (0, "newCall", "A", IN + "&xcid=cd&origCallId=Z"), (3, "answer", "A", ALICE), (20, "newCall", "B", "xcid=cd&origCallId=Y"),
        (40, "hangup", "A", "cause=normalClearing"), (50, "hangup", "B", "cause=normalClearing")),
        ("in", "Alice Bob", "Alice", 3, 47, "answered", "normalClearing", "", "A B")),
    "transfer that nothing links": (flow(
        (0, "newCall", "A", IN), (3, "answer", "A", ALICE), (20, "newCall", "B", "direction=in&origCallId=Z"),
        (25, "hangup", "B", "cause=busy"), (40, "hangup", "A", "cause=normalClearing")),
        ("in", "Alice Bob", "Alice", 3, 37, "answered", "normalClearing", "", "A"),
        ("in", "", "", 5, None, "missed", "busy", "", "B")),
    "two legs that a third joins": (flow(
        (0, "newCall", "A", IN + "&xcid=x1"), (1, "newCall", "B", "direction=in&xcid=x2"), (2, "newCall", "C", "xcid=x1&origCallId=B"),
        (3, "hangup", "A", "cause=cancel"), (4, "hangup", "B", "cause=cancel"), (5, "hangup", "C", "cause=cancel")),
        ("in", "Alice Bob", "", 5, None, "missed", "cancel", "", "A B C")),
    "the same xcid two days later": (flow(
        (0, "newCall", "A", IN + "&xcid=ab"), (1, "hangup", "A", "cause=cancel"), (172_800, "newCall", "B", IN + "&xcid=ab"),
        (172_803, "hangup", "B", "cause=cancel")),
        ("in", "Alice Bob", "", 1, None, "missed", "cancel", "", "A"), ("in", "Alice Bob", "", 3, None, "missed", "cancel", "", "B")),
    "menu": (flow((0, "newCall", "A", IN), (3, "dtmf", "A", "dtmf=1"), (6, "dtmf", "A", "dtmf=0042"), (7, "dtmf", "A", "dtmf="),
                  (9, "hangup", "A", "cause=normalClearing")),
             ("in", "Alice Bob", "", 9, None, "missed", "normalClearing", "1,0042", "A")),
    "answer lost": (flow((0, "newCall", "A", IN), (60, "hangup", "A", "cause=normalClearing")),
                    ("in", "Alice Bob", "", 60, None, "missed", "normalClearing", "", "A")),
    "newCall lost": (flow((5, "answer", "A", ALICE + "&direction=in&from=4921100&to=4930200"), (8, "hangup", "A", "cause=normalClearing")),
                     ("in", "", "Alice", 0, 3, "answered", "normalClearing", "", "A")),
    "only a hangup": (flow((8, "hangup", "A", "cause=chanunavail&direction=in&from=4921100&to=4930200")),
                      ("in", "", "", 0, None, "missed", "chanunavail", "", "A")),
    "hangup lost": (flow((0, "newCall", "A", IN), (5, "answer", "A", ALICE)),
                    ("in", "Alice Bob", "Alice", 5, None, "lost", "", "", "A")),
    "a repeat changes nothing": (flow((0, "newCall", "A", IN), (4, "answer", "A", ALICE), (5, "answer", "A", ALICE), (9, "hangup", "A", ""),
                                      (12, "hangup", "A", "cause=cancel")),
                                 ("in", "Alice Bob", "Alice", 4, 5, "answered", "", "", "A")),
}


def calls_database():
    """An empty database with the tables of events and calls."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(sc.SCHEMA)
    sc.prepare_calls(connection)
    return connection


def add_events(connection, rows, together=False):
    for row in rows:
        connection.execute("INSERT INTO events(received_at, event, call_id, body) VALUES (?, ?, ?, ?)", row)
        if not together:
            sc.update_calls(connection, 100)
    sc.update_calls(connection, 1000)


def all_calls(connection, now=1e9 + 10 * 86400, **options):
    return [call for call, _ in sc.find_calls(connection, now, limit=1000, **options)]


class CallsTest(unittest.TestCase):
    def connection(self):
        connection = calls_database()
        self.addCleanup(connection.close)
        return connection

    def test_each_flow_makes_the_calls_that_a_person_saw(self):
        for name, (rows, *expected) in FLOWS.items():
            connection = self.connection()
            add_events(connection, rows)
            with self.subTest(name):
                self.assertEqual([(call.direction, " ".join(call.users), call.answered_by, call.wait_s, call.talk_s, call.outcome,
                                   call.cause, call.digits, " ".join(call.legs)) for call in all_calls(connection)], expected)

    def test_the_order_in_which_events_arrive_makes_no_difference(self):
        chance = random.Random(7)
        for name, (rows, *_) in FLOWS.items():
            connection = self.connection()
            add_events(connection, rows)
            expected = all_calls(connection)
            orders = list(itertools.permutations(rows))
            # All of up to 5 events; of the 720 of 6 some that chance picks.
            for order in orders if len(orders) <= 120 else chance.sample(orders, 60):
                connection.executescript("DELETE FROM events; DELETE FROM legs; DELETE FROM links; DELETE FROM calls; "
                                         "UPDATE derived SET up_to = 0")
                add_events(connection, order)
                self.assertEqual(all_calls(connection), expected, (name, order))

    def test_calls_that_are_rebuilt_are_the_same(self):
        connection = self.connection()
        rows = [(at + shift * 300_000, event, f"{leg}{shift}", body.replace(b"Id=A", b"Id=A%d" % shift).replace(
            b"Id=B", b"Id=B%d" % shift).replace(b"Id=C", b"Id=C%d" % shift).replace(b"xcid=", b"xcid=%d" % shift))
            for shift, (events, *_) in enumerate(FLOWS.values()) for at, event, leg, body in events]
        add_events(connection, rows, together=True)
        before = connection.execute("SELECT * FROM calls ORDER BY id").fetchall()
        self.assertEqual(len(before), len(FLOWS) + 2)
        connection.execute("UPDATE derived SET version = 0")
        sc.prepare_calls(connection)
        self.assertEqual(all_calls(connection), [])
        while sc.update_calls(connection, 3):
            pass
        self.assertEqual(connection.execute("SELECT * FROM calls ORDER BY id").fetchall(), before)

    def test_what_time_alone_decides_is_decided_when_it_is_read(self):
        connection = self.connection()
        add_events(connection, flow((0, "newCall", "A", IN), (0, "newCall", "B", IN), (3, "answer", "B", ""),
                                    (0, "newCall", "C", IN), (9, "hangup", "C", "cause=forwarded")))

        def seen(after):
            return {"".join(call.legs): call.outcome for call in all_calls(connection, 1e9 + after)}

        self.assertEqual(seen(68), {"A": "ringing", "B": "talking", "C": "ringing"})
        self.assertEqual(seen(69), {"A": "ringing", "B": "talking", "C": "forwarded"})
        self.assertEqual(seen(6 * 3600), {"A": "lost", "B": "talking", "C": "forwarded"})
        self.assertEqual(seen(6 * 3600 + 3), {"A": "lost", "B": "lost", "C": "forwarded"})
        add_events(connection, flow((8 * 3600, "hangup", "B", "cause=normalClearing")))
        self.assertEqual(seen(9 * 3600)["B"], "answered")

    def test_events_without_a_call_id_are_a_call_each(self):
        connection = self.connection()
        add_events(connection, [(1e9, "newCall", "", b""), (1e9, "newCall", "", b"")])
        self.assertEqual([call.legs for call in all_calls(connection)], [(), ()])

    def test_who_was_spoken_to_since_need_not_be_rung_back(self):
        connection = self.connection()
        hangup = "cause=cancel"
        for n, (number, later) in enumerate([("49111", None), ("49222", "in"), ("49333", "out"), ("49444", "missed"),
                                             ("anonymous", "in"), ("49555", "before")]):
            at = 100_000 * n
            add_events(connection, flow((at, "newCall", f"m{n}", f"direction=in&from={number}&to=4930200"),
                                        (at + 5, "hangup", f"m{n}", hangup)))
            if later:
                pair = ("4930200", number) if later == "out" else (number, "4930200")
                at += -500 if later == "before" else 500
                rows = [(at, "newCall", f"l{n}", f"direction={'out' if later == 'out' else 'in'}&from={pair[0]}&to={pair[1]}"),
                        (at + 5, "answer", f"l{n}", "user=Alice"), (at + 9, "hangup", f"l{n}", hangup)]
                add_events(connection, flow(*(row for row in rows if later != "missed" or row[1] != "answer")))
        self.assertEqual([call.from_number for call in all_calls(connection, missed=True)],
                         ["49111", "49444", "49444", "anonymous", "49555"])

    def test_calls_are_found_by_number_and_time(self):
        connection = self.connection()
        for n in range(30):
            add_events(connection, flow((n, "newCall", str(n), f"direction=in&from=49211{n:02}&to=4930200")))
        self.assertEqual([call.from_number for call in all_calls(connection, number="492110*")], [f"492110{n}" for n in range(10)])
        self.assertEqual(len(all_calls(connection, number="4930200")), 30)
        self.assertEqual(len(all_calls(connection, number="21100")), 0)
        self.assertEqual(len(all_calls(connection, since=1e9 + 25)), 5)
        self.assertEqual([(call.started - 1e9, [event.call_id for _, event in events])
                          for call, events in sc.find_calls(connection, 1e9, limit=2)], [(28, ["28"]), (29, ["29"])])

    def test_a_number_is_found_wherever_it_stood(self):
        connection = self.connection()
        add_events(connection, FLOWS["transfer, picked up"][0])
        for number in ("4921100", "4930200", "4930201", "4930203"):
            self.assertEqual(len(all_calls(connection, number=number)), 1, number)
        self.assertEqual(all_calls(connection, number="493020"), [])

    def test_repeats_cost_nothing(self):
        connection = self.connection()
        began = time.monotonic()
        add_events(connection, flow(*((n, "newCall", "A", IN) for n in range(1000))))
        self.assertLess(time.monotonic() - began, 2)
        add_events(connection, flow((2000, "hangup", "A", "cause=cancel")))
        self.assertEqual([(call.outcome, call.wait_s) for call in all_calls(connection)], [("missed", 2000)])

    def test_times_that_run_backwards_make_no_negative_seconds(self):
        connection = self.connection()
        add_events(connection, flow((0, "newCall", "A", IN), (50, "answer", "A", ""), (40, "hangup", "A", "")))
        self.assertEqual([(call.wait_s, call.talk_s) for call in all_calls(connection)], [(50, 0)])

    def test_the_same_xcid_links_for_a_day_and_no_longer(self):
        for apart, calls in [(24 * 3600, 1), (24 * 3600 + 1, 2)]:
            connection = self.connection()
            add_events(connection, flow((0, "newCall", "A", "xcid=a"), (apart, "newCall", "B", "xcid=a")))
            self.assertEqual(len(all_calls(connection)), calls)

    def test_the_leg_that_others_name_is_the_first_even_if_it_came_later(self):
        connection = self.connection()
        add_events(connection, flow((0, "newCall", "B", "from=2&origCallId=A"), (1, "newCall", "A", "from=1&direction=in")))
        self.assertEqual([call.from_number for call in all_calls(connection)], ["1"])

    def test_events_at_the_same_moment_make_the_same_call_in_any_order(self):
        rows = flow((0, "newCall", "A", IN), (5, "answer", "A", "user=Alice"), (5, "answer", "A", "user=Bob"),
                    (7, "dtmf", "A", "dtmf=1"), (7, "dtmf", "A", "dtmf=2"))
        found = []
        for order in itertools.permutations(rows):
            connection = self.connection()
            add_events(connection, order)
            found += all_calls(connection)
        self.assertEqual(len(set(found)), 1)

    def test_forgetting_leaves_nothing_in_any_form_and_joins_nothing(self):
        connection = self.connection()
        forms = ("49157999", "%2B49157999", "%2049157999", "%34%39157999", "49157999%40sipgate.de", "+49157999")
        add_events(connection, flow(*((n, "newCall", f"leg{n}", f"direction=in&from={form}&user[]=49157999") for n, form in enumerate(forms))))
        add_events(connection, flow((10, "newCall", "49157999", "from=1"), (11, "newCall", "C", "origCallId=49157999&from=2"),
                                    (12, "newCall", "D", "xcid=49157999"), (13, "answer", "D", "answeringNumber=491579990")))
        connection.execute("UPDATE events SET digest = id")
        self.assertEqual(len(all_calls(connection)), 8)
        self.assertEqual(sc.forget_in(connection, "49157999"), 8)
        for table in ("events", "calls", "legs", "links"):
            for row in connection.execute(f"SELECT * FROM {table}"):
                for value in row:
                    text = value.decode() if isinstance(value, bytes) else str(value)
                    self.assertIsNone(re.search("49157999(?!0)", sc.plain_text(text.encode())), (table, row))
        self.assertEqual(len(all_calls(connection)), 8)
        self.assertEqual(connection.execute("SELECT count(*) FROM events WHERE digest IS NULL").fetchone(), (9,))
        add_events(connection, flow((20, "newCall", "4930300", "from=3")))
        sc.forget_in(connection, "4930300")
        self.assertEqual(len(all_calls(connection)), 9, "two who were forgotten are not the same")
        add_events(connection, flow((30, "hangup", "E", "cause=normalClearing")))
        sc.forget_in(connection, "normalClearing")
        self.assertEqual(all_calls(connection)[-1].cause, "normalClearing")

    def test_old_calls_go_with_their_events(self):
        connection = self.connection()
        for rows, *_ in (FLOWS["forwarded to voicemail"], FLOWS["the same xcid two days later"]):
            add_events(connection, rows)
        add_events(connection, flow((-1, "newCall", "edge", IN), (100_000, "hangup", "edge", "cause=cancel&direction=in")))
        before = 1e9 + 50_000
        connection.execute("DELETE FROM events WHERE received_at < ?", (before,))
        while sc.remove_calls(connection, before):
            pass
        kept = connection.execute("SELECT * FROM calls ORDER BY id").fetchall(), connection.execute("SELECT * FROM legs").fetchall()
        self.assertEqual([call.legs for call in all_calls(connection)], [("edge",), ("B",)])
        connection.execute("UPDATE derived SET version = 0")
        sc.prepare_calls(connection)
        sc.update_calls(connection, 1000)
        self.assertEqual((connection.execute("SELECT * FROM calls ORDER BY id").fetchall(),
                          connection.execute("SELECT * FROM legs").fetchall()), kept)


class ShownCallsTest(unittest.TestCase):
    CALL = sc.Call("in", "492111234567", "4915791234567", ("Alice", "Bob"), "Alice", 1e9, 1e9 + 4, 1e9 + 96.5, 4.0, 92.5, "answered",
                   "normalClearing", "1,0042", ("A", "B"))
    MISSED = replace(CALL, from_number="", users=(), answered_by="", answered=None, wait_s=96.5, talk_s=None, outcome="missed", digits="")

    def test_a_table_fits_80_columns_and_uses_more(self):
        long = replace(self.CALL, outcome="unanswered", answered_by="Somebody with a very long name indeed")
        started = time.strftime("%m-%d %H:%M", time.localtime(1e9))
        self.assertEqual(sc.table([self.CALL, self.MISSED], 80), [
            "STARTED        FROM          TO             OUTCOME  WAIT TALK BY",
            f"{started} in +492111234567 +4915791234567 answered 0:04 1:32 Alice",
            f"{started} in unknown       +4915791234567 missed   1:36"])
        self.assertEqual(max(map(len, sc.table([long], 80))), 80)
        self.assertTrue(sc.table([long], 200)[1].endswith("name indeed"))
        hostile = sc.table([replace(self.CALL, answered_by="\x1b[2J\u5c71" * 30, from_number="\xad" + "9" * 70)], 80)
        self.assertNotIn("\x1b", "".join(hostile))
        self.assertEqual([sum(2 if char == "\u5c71" else 1 for char in line) <= 80 for line in hostile], [True, True])
        self.assertIn(" answered ", hostile[1])

    def test_totals(self):
        self.assertEqual(sc.totals([self.CALL, self.MISSED]), "2 calls, 1 answered, 1 missed, average wait 0:50, average talk 1:32")
        self.assertEqual(sc.totals([replace(self.MISSED, wait_s=None)]), "1 call, 0 answered, 1 missed, average wait -, average talk -")

    def test_json_is_raw_and_null_where_nothing_is_known(self):
        self.assertEqual(sc.call_entry(self.MISSED), {
            "direction": "in", "from": None, "to": "4915791234567", "users": [], "answered_by": None,
            "started": "2001-09-09T01:46:40.000Z", "answered": None, "ended": "2001-09-09T01:48:16.500Z", "wait_s": 96.5,
            "talk_s": None, "outcome": "missed", "cause": "normalClearing", "digits": None, "legs": ["A", "B"]})

    def test_csv_is_safe_in_a_spreadsheet(self):
        for value, cell in [("492111234567", "'492111234567"), ("=1+1", "'=1+1"), ("+49", "'+49"), ("-1", "'-1"), ("@a", "'@a"),
                            ("123456e0", "'123456e0"), ("1,0042", "'1,0042"), (" =1", "' =1"), ("\n=1", "'\n=1"), ("\uff1d1", "'\uff1d1"),
                            ("2026-11-23T17:50:00.000Z", "2026-11-23T17:50:00.000Z"), ("Alice", "Alice"), (None, None), (["A", "B"], "A B"), (92.5, 92.5)]:
            self.assertEqual(sc.csv_cell(value), cell)

    def test_lines_of_a_call_that_is_known(self):
        for event, line in [
                (HangupEvent(cause="normalClearing", call=self.CALL), "The call has been hung up (normalClearing, talked 1:32)"),
                (HangupEvent(cause="cancel", call=self.MISSED), "The call has been hung up (cancel, missed after 1:36)"),
                (HangupEvent(cause="forwarded", call=replace(self.MISSED, ended=None)), "The call has been hung up (forwarded)"),
                (HangupEvent(call=self.CALL), "The call has been hung up (talked 1:32)"),
                (DtmfEvent(dtmf="12", call=self.CALL), "492111234567 pressed 12"),
                (DtmfEvent(dtmf="12", call=self.MISSED), "[unknown] pressed 12")]:
            self.assertEqual(sc.event_line(event), line)
        self.assertEqual([sc.duration(seconds) for seconds in (0, 59.9, 60, 3599, 3600, 36_061)],
                         ["0:00", "0:59", "1:00", "59:59", "1:00:00", "10:01:01"])


class CallsInTheLogTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "calls.db")

    def log(self, extension=sc.CALLS):
        log = CallLog(self.path, 30, time.time, extension)
        self.addCleanup(log.close, 5)
        return log

    def record(self, log, rows):
        for at, event, leg, body in rows:
            self.assertTrue(log.record((at + time.time() - 1e9 - 200, event, leg, body, None), 5))

    def test_your_code_knows_the_call(self):
        seen = []
        receiver = Receiver(TRIAL, [], CallFunctions(on_answer=seen.append, on_hangup=seen.append, on_dtmf=seen.append),
                            call_log=self.log())
        for path, body in [("/new-call", NEW_CALL), ("/on-data", DTMF), ("/on-answer", ANSWER), ("/on-hangup", HANGUP)]:
            receiver.receive(path, body).afterwards()
        receiver.follow_ups.finish(5)
        self.assertEqual([event.call.outcome for event in seen], ["ringing", "talking", "answered"])
        self.assertEqual((seen[2].call.from_number, seen[2].call.answered_by, seen[2].call.digits), ("492111234567", "John Doe", "1"))
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            receiver.call_log.LOCK_SECONDS = 0.05
            other.execute("BEGIN EXCLUSIVE")
            receiver.call_log._fall_behind("a test")
            receiver.receive("/on-hangup", HANGUP).afterwards()
        receiver.follow_ups.finish(5)
        self.assertIsNone(seen[3].call, "the log is behind")

    def test_a_file_from_before_has_its_calls_put_together(self):
        log = self.log(None)
        self.record(log, FLOWS["forwarded to voicemail"][0])
        log.close(5)
        log = self.log()
        wait_until(lambda: log.call("B"))
        self.assertEqual(log.call("A").outcome, "voicemail")
        self.assertEqual(log.call("A"), log.call("B"))
        self.assertIsNone(log.call("C"))

    def test_a_restart_in_mid_call_loses_nothing(self):
        rows = FLOWS["answered"][0]
        for row in rows:
            log = self.log()
            self.record(log, [row])
            log.close(5)
        log = self.log()
        self.assertEqual((log.call("A").outcome, round(log.call("A").talk_s)), ("answered", 92))

    def test_an_error_in_putting_calls_together_keeps_no_event_from_being_stored(self):
        def fail(connection, most):
            raise KeyError("a fault")

        log = self.log(sc.CALLS._replace(update=fail))
        with diagnostics() as said:
            self.record(log, FLOWS["answered"][0])
        self.assertEqual(log.count(), 3)
        self.assertIn("calls are no longer put together", "".join(said) + "calls are no longer put together" * (not said))
        self.assertIsNone(log.extension)

    def test_part_one_serves_with_part_two_cut_off(self):
        source = text_of("sipgate_callevents.py")
        part_one = source[:source.index("# ====", source.index("# PART II") - 100)]
        path = os.path.join(self.folder, "part_one.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(part_one + "import sys\nsys.exit(serve(Settings(webhook_port=0, call_log='off')))\n")
        program = Program(script=path, folder=self.folder)
        self.addCleanup(program.kill)
        self.assertEqual(program.post("/new-call", NEW_CALL)[0], 200)
        self.assertEqual(program.post("/on-hangup", HANGUP)[0], 200)
        self.assertEqual(program.end()[0], 0)


# ------------------------------------------------------------------------------------------
# Rehearsal
# ------------------------------------------------------------------------------------------

def rehearse(url, name="answered", key=None, alias="", **changed):
    """What is said in a rehearsal, and the player."""
    said = []
    options = argparse.Namespace(**{"sender": "492111234567", "to": "4915791234567", "user": None, "digits": "1", "pause": 0, **changed})
    player = sc.Sipgate(url, options, said.append, key, alias)
    player.play(sc.SCENARIOS[name])
    return said, player


class RehearsalTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.key = sc.ThrowAwayKey()
        cls.running = Running(LIVE)
        cls.running.receiver.keys = [cls.key.public]
        cls.log = cls.running.receiver.call_log = CallLog(os.path.join(cls.folder, "calls.db"), 30, extension=sc.CALLS)
        cls.addClassCleanup(cls.log.close, 5)
        cls.addClassCleanup(cls.running.stop)

    def rehearse(self, name="answered", functions=NO_FUNCTIONS, **changed):
        """What is said, the call that the log holds then, and what the server was sent."""
        self.running.receiver.functions = functions
        self.running.shown.clear()
        said, player = rehearse(f"http://127.0.0.1:{self.running.server.server_port}/new-call", name, self.key,
                                "https://example.localhost.run", **changed)
        self.assertEqual(player.complaints, 0, said)
        return said, self.log.call(player.call_ids["A"]), list(self.running.shown)

    def test_each_scenario_leaves_its_call_in_the_log(self):
        for name, users, by, outcome, cause, direction in [
                ("answered", "Alice Bob", "Alice", "answered", "normalClearing", "in"),
                ("missed", "Alice Bob", "", "missed", "cancel", "in"),
                ("busy", "Alice Bob", "", "missed", "busy", "in"),
                ("declined", "Alice Bob", "", "missed", "noAnswer", "in"),
                ("group", "Alice Bob Carl", "Bob", "answered", "normalClearing", "in"),
                ("anonymous", "Alice Bob", "Alice", "answered", "normalClearing", "in"),
                ("outgoing", "Alice Bob", "Alice", "answered", "normalClearing", "out"),
                ("voicemail", "Alice Bob", "", "voicemail", "normalClearing", "in"),
                ("transfer", "Alice Bob Carl", "Alice", "answered", "normalClearing", "in"),
                ("menu", "Alice Bob", "", "missed", "normalClearing", "in")]:
            with self.subTest(name):
                _, call, _ = self.rehearse(name)
                self.assertEqual((" ".join(call.users), call.answered_by, call.outcome, call.cause, call.direction),
                                 (users, by, outcome, cause, direction))
        self.assertEqual(len(sc.SCENARIOS), 10)

    def test_the_conversation_is_shown_in_both_directions(self):
        said, _, _ = self.rehearse()
        self.assertEqual([re.sub(r"in \d+ ms", "in N ms", line) for line in said], [
            "--> newCall  492111234567 to 4915791234567 (Alice, Bob)",
            "<-- 200 in N ms  no action, follow-ups to /on-answer and /on-hangup",
            "--> answer   Alice", "<-- 200 in N ms", "--> hangup   normalClearing", "<-- 200 in N ms"])

    def test_what_your_code_decides_is_done(self):
        for action, said_of_it, outcome, by in [
                (reject("busy"), "Reject busy", "missed", ""), (hang_up(), "Hangup", "missed", ""),
                (dial("4921100", "4921200"), "Dial 4921100 4921200", "answered", "4921100"),
                (voicemail(), "Dial voicemail", "voicemail", ""), (play("http://x/a.wav"), "Play http://x/a.wav", "answered", "Alice")]:
            with self.subTest(said_of_it):
                said, call, events = self.rehearse(functions=CallFunctions(on_new_call=lambda event, action=action: action))
                self.assertIn(f"ms  {said_of_it}, follow-ups", said[1])
                self.assertEqual((call.outcome, call.answered_by), (outcome, by))
                self.assertEqual([event.event for event in events],
                                 ["newCall", "answer", "hangup"] if by or outcome == "voicemail" else ["newCall", "hangup"])

    def test_a_transfer_that_is_refused_leaves_the_first_leg_alone(self):
        functions = CallFunctions(on_new_call=lambda event: reject() if event.users == ("Carl",) else None)
        _, call, events = self.rehearse("transfer", functions)
        self.assertEqual([(event.event, getattr(event, "cause", "")) for event in events], [
            ("newCall", ""), ("answer", ""), ("newCall", ""), ("hangup", "normalClearing"), ("hangup", "noAnswer")])
        self.assertEqual((call.outcome, call.answered_by), ("answered", "Alice"))
        _, call, events = self.rehearse("transfer", CallFunctions(on_new_call=lambda event: reject()))
        self.assertEqual([event.event for event in events], ["newCall", "hangup"])

    def test_a_menu_gets_its_digits(self):
        functions = CallFunctions(
            on_new_call=lambda event: gather(state="first"),
            on_dtmf=lambda event: gather(max_digits=4, state="second") if event.state == "first" else hang_up())
        said, call, events = self.rehearse("menu", functions, digits="1,0042")
        self.assertEqual([(event.dtmf, event.state) for event in events if isinstance(event, DtmfEvent)],
                         [("1", "first"), ("0042", "second")])
        self.assertEqual(call.digits, "1,0042")
        self.assertIn("--> dtmf     0042", said)
        said, call, events = self.rehearse("menu", functions, digits="")
        self.assertEqual([event.dtmf for event in events if isinstance(event, DtmfEvent)], ["", ""])
        self.assertIn("--> dtmf     (no key pressed)", said)

    def test_its_requests_look_like_sipgate_s(self):
        received = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def take():
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(5)
                    received.append(connection.recv(65536))
                    while b"&" not in b"".join(received):
                        received.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/xml\r\n\r\n<Response/>")

            thread = threading.Thread(target=take)
            thread.start()
            rehearse(f"http://127.0.0.1:{listener.getsockname()[1]}/new-call", key=self.key)
            thread.join()
        head, _, body = b"".join(received).partition(b"\r\n\r\n")
        for line in (b"User-Agent: sipgate.io", b"X-SIPGATE-JOBS: http://www.sipgate.de/jobs", b"Accept-Charset: utf-8",
                     b"Content-Type: application/x-www-form-urlencoded; charset=UTF-8", b"Content-Length: %d" % len(body)):
            self.assertIn(line, head)
        self.assertIn(b"&user%5B%5D=Alice&user%5B%5D=Bob&", body)
        self.assertRegex(body, rb"&callId=[0-9A-F]{64}&origCallId=[0-9A-F]{64}&xcid=[0-9a-f]{16}&")
        self.assertTrue(is_signed(body, re.search(rb"X-Sipgate-Signature: (.*)", head)[1].decode().strip(), [self.key.public]))


class WrongServer(http.server.BaseHTTPRequestHandler):
    """Replies with what the test has put into `replies`, by path."""

    replies = {}  # noqa: RUF012 - the tests set it

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content_type, body, headers = self.replies.get(self.path, (404, "text/plain", b"", {}))
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *args):
        pass


class ComplaintTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WrongServer)
        cls.url = f"http://127.0.0.1:{cls.server.server_port}"
        thread = threading.Thread(target=cls.server.serve_forever, args=(0.01,))
        thread.start()
        cls.addClassCleanup(cls.server.server_close)
        cls.addClassCleanup(thread.join)
        cls.addClassCleanup(cls.server.shutdown)

    def complaints(self, body, content_type="application/xml", status=200, **options):
        WrongServer.replies = {"/new-call": (status, content_type, body.encode(), {})}
        said, player = rehearse(self.url + "/new-call", **options)
        found = [line[4:] for line in said if line.startswith("!!! ")]
        self.assertEqual(len(found), player.complaints)
        return found

    def test_what_sipgate_would_ignore_or_misunderstand_is_named(self):
        whole = "expected a whole URL with http(s)://"
        for body, *complaints in [
                ("<Response />",),
                ("hello", "the reply is no XML (syntax error: line 1, column 0): sipgate lets the call go on"),
                ("<Answer />", "the root is <Answer>: expected <Response>"),
                ("<Response><Say /></Response>", "<Say> is no action of sipgate's: it is ignored"),
                ("<Response><Hangup /><Reject /></Response>", "2 actions in one <Response>: sipgate documents one"),
                ("<Response><Dial>" + "<Number>4921</Number>" * 6 + "</Dial></Response>",
                 "<Dial> has 6 numbers: expected 1 to 5, or <Voicemail/>"),
                ("<Response><Dial /></Response>", "<Dial> has 0 numbers: expected 1 to 5, or <Voicemail/>"),
                ("<Response><Dial><Number>+4921</Number></Dial></Response>", "<Number> is '+4921': expected digits without +"),
                ("<Response><Gather /></Response>", "<Gather> has no onData: the digits go nowhere"),
                ("<Response><Gather onData='/x' /></Response>", f"onData is '/x': {whole}"),
                ("<Response onAnswer='http://[bad/x' />", f"onAnswer is 'http://[bad/x': {whole}"),
                ("<Response onHangup='http://x:99999/' />", f"onHangup is 'http://x:99999/': {whole}"),
                ("<Response onHangup='http://x.example/\u00fc' />", f"onHangup is 'http://x.example/\u00fc': {whole}"),
                ("<Response onHangup='http://.x.example/' />", f"onHangup is 'http://.x.example/': {whole}"),
                ("<?xml version='1.0' encoding='foo'?><Response/>", "the reply is no XML (unknown encoding: foo): sipgate lets the call go on"),
                ("<?xml version='1.0' encoding='gbk'?><Response/>",
                 "the reply is no XML (multi-byte encodings are not supported): sipgate lets the call go on"),
                ("<Response><Gather onData='http://y.example/' timeout='" + "9" * 5000 + "' /></Response>",
                 f"timeout is '{'9' * 40}': expected a whole number of 1 or more", "http://y.example/ is on another host: it is not followed"),
                ("<Response><Gather onData='http://y.example/' timeout='10' /></Response>",
                 "timeout is 10: it counts in milliseconds; is 10000 meant?", "http://y.example/ is on another host: it is not followed"),
                ("<Response><Gather onData='http://y.example/' maxDigits='0' /></Response>",
                 "maxDigits is '0': expected a whole number of 1 or more", "http://y.example/ is on another host: it is not followed"),
                ("<Response><Play>http://x/a.wav</Play></Response>", "<Play> has no <Url>: nothing is played"),
                ("<Response><Play><Url>a.wav</Url></Play></Response>", f"<Url> is 'a.wav': {whole}"),
                ("<Response><Reject reason='later' /></Response>", "reason is 'later': expected rejected or busy"),
                ("<Response><Reject><Number>1</Number></Reject></Response>", "<Number> does not belong into <Reject>: it is ignored"),
                ("<Response onHangup='http://y.example/h' />", "http://y.example/h is on another host: it is not followed")]:
            with self.subTest(body):
                self.assertEqual(self.complaints(body), complaints)
        self.assertEqual(self.complaints("<Response />", "text/html"), ["the Content-Type is text/html: expected application/xml"])
        self.assertEqual(self.complaints("", status=500), ["the status is 500: sipgate takes 200 only, and lets the call go on"])
        self.assertEqual(self.complaints(f"<Response onHangup='{self.url}/none' />"), ["the status is 404: expected 200"])

    def test_a_menu_without_an_end_is_named(self):
        WrongServer.replies = {}
        again = f"<Response><Gather onData='{self.url}/new-call' /></Response>"
        self.assertEqual(self.complaints(again), ["20 times <Gather> in a row: the menu never ends"])

    def test_a_late_reply_is_named(self):
        self.assertEqual(sc.understand(200, "application/xml", b"<Response />", 3.21).complaints,
                         ["the reply took 3.2 s: the caller hears nothing meanwhile; 3 s is the most that is bearable"])

    def test_a_server_that_is_not_there_is_named(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        said, player = rehearse(f"http://127.0.0.1:{port}/new-call")
        self.assertEqual(player.complaints, 1)
        self.assertIn("!!! no reply: [Errno", said[1])

    def test_a_403_is_explained(self):
        WrongServer.replies = {"/new-call": (403, "text/plain", b"", {})}
        said, _ = rehearse(self.url + "/new-call")
        self.assertIn("    (403: that server checks signatures, and a rehearsal against --url is not signed by sipgate)", said)

    def test_a_sound_that_sipgate_would_skip_is_named(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.wav")
            for channels, bits, rate, fault in [(1, 16, 8000, ""), (2, 16, 8000, "it has 2 channels, 16 bit, 8000 Hz"),
                                                (1, 8, 8000, "it has 1 channels, 8 bit, 8000 Hz"),
                                                (1, 16, 44100, "it has 1 channels, 16 bit, 44100 Hz")]:
                with wave.open(path, "wb") as sound:
                    sound.setnchannels(channels)
                    sound.setsampwidth(bits // 8)
                    sound.setframerate(rate)
                    sound.writeframes(bytes(320))
                self.assertEqual(sc.check_sound(path), fault)
            with open(path, "wb") as file:
                file.write(b"ID3 mp3")
            self.assertIn("it is no PCM WAV file", sc.check_sound(path))


# ------------------------------------------------------------------------------------------
# Check
# ------------------------------------------------------------------------------------------

class CheckTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = os.path.join(self.folder, "calls.db")

    def serve(self, replies):
        """The URL of a server that gives `replies` by path."""
        WrongServer.replies = replies
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WrongServer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        return f"http://localhost:{server.server_port}"

    def way_in(self, url, instance="me"):
        return sc.check_way_in(Settings(webhook_url=url), instance)

    def test_the_way_in(self):
        def health(instance):
            return 200, "text/plain", b"ok", {"X-Instance": instance}

        url = self.serve({"/p/healthz": health("me"), "/q/healthz": health("other"), "/healthz": health("me"),
                          "/r/healthz": (200, "text/html", b"<html>", {})})
        self.assertEqual(self.way_in(url + "/p"), ("ok", f"{url}/p leads to this script"))
        self.assertEqual(self.way_in(url + "/q"), (
            "problem", f"{url}/q leads to another copy of this script: check the port that the tunnel or proxy leads to"))
        self.assertEqual(self.way_in(url + "/cut"), (
            "problem", f"{url}/cut: the path /cut does not get through: let the proxy pass it on, or take it out of WEBHOOK_URL, if the "
            "running copy has the same one"))
        self.assertEqual(self.way_in(url + "/r", "")[0], "problem", "no instance is the same as no other")
        self.assertEqual(self.way_in("http://127.0.0.1..x:1")[0], "problem")
        WrongServer.replies.pop("/healthz")
        self.assertEqual(self.way_in(url + "/none"), (
            "problem", f"{url}/none/healthz is not found there (404): the path or the address is another one"))
        self.assertEqual(self.way_in(url + "/r"), (
            "problem", f"{url}/r leads to another server (status 200): check where the tunnel or proxy leads"))
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        kind, text = self.way_in(f"http://localhost:{port}")
        self.assertEqual((kind, text.partition(" cannot be reached (")[2].partition(")")[2]), ("problem", ": is the tunnel or proxy running?"))

    def test_a_way_in_that_takes_too_long_may_be_the_router(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as restored:
            original = sc.get_health
            restored.callback(setattr, sc, "get_health", original)
            sc.get_health = lambda url: original(url, 0.1)
            kind, text = self.way_in(f"http://localhost:{silent.getsockname()[1]}")
        self.assertEqual((kind, "router" in text), ("warning", True))

    def test_certificates_that_sipgate_will_not_accept(self):
        for number, trusted, host, said in [(0, False, "localhost", "self[- ]signed certificate"), (2, True, "localhost", "certificate has expired"),
                                            (0, True, "127.0.0.1", "IP address mismatch|not valid for")]:
            paths = [os.path.join(self.folder, name) for name in ("cert.pem", "key.pem")]
            for path, text in zip(paths, CERTIFICATES[number]):
                with open(path, "w", encoding="ascii") as file:
                    file.write(text)
            running = Running(tls=sc.TlsFiles(*paths))
            before = os.environ.get("SSL_CERT_FILE")
            try:
                os.environ["SSL_CERT_FILE"] = paths[0] if trusted else os.path.join(self.folder, "none")
                kind, text = self.way_in(f"https://{host}:{running.server.server_port}")
            finally:
                running.stop()
                os.environ.pop("SSL_CERT_FILE")
                if before is not None:
                    os.environ["SSL_CERT_FILE"] = before
            self.assertEqual(kind, "problem")
            self.assertRegex(text, f"sipgate will not accept the certificate: .*({said})")
        with self.subTest("no https"):
            self.assertRegex(self.way_in(self.serve({}).replace("http:", "https:"))[1], "does not speak https there")

    def test_the_port(self):
        running = Running()
        self.addCleanup(running.stop)
        port = running.server.server_port
        settings = Settings(webhook_port=port)
        self.assertEqual(sc.check_port(settings), (
            ("ok", f"port {port} of 127.0.0.1 is held by a running copy of this script"), running.server.instance))
        running.receiver.refused = 3
        self.assertEqual(sc.check_port(settings)[0], (
            "warning", f"port {port} of 127.0.0.1 is held by a running copy, which has refused 3 webhooks: its stderr says why"))
        running.server.stopping = True
        self.assertEqual(sc.check_port(settings)[0], ("problem", f"port {port} of 127.0.0.1: the running copy says: stopping"))
        other = int(self.serve({}).rpartition(":")[2])
        self.assertEqual(sc.check_port(Settings(webhook_port=other))[0], (
            "problem", f"port {other} of 127.0.0.1 is held by another program: stop it, or choose another port"))
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        self.assertEqual(sc.check_port(Settings(webhook_port=port)), (("ok", f"port {port} of 127.0.0.1 is free"), ""))

    def test_the_way_in_is_tried_even_if_nobody_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        settings = Settings(webhook_port=port, webhook_url=f"http://localhost:{port}/p")
        self.assertEqual(list(sc.check_network(settings)), [
            ("ok", f"port {port} of 127.0.0.1 is free"), ("ok", f"http://localhost:{port}/p leads to this script")])
        self.assertEqual(list(sc.check_network(replace(settings, webhook_url="")))[1], (
            "warning", "no WEBHOOK_URL: trial mode, sipgate cannot reach this machine"))

    def test_the_call_log(self):
        self.assertEqual(list(sc.check_log("off")), [("ok", "call log: off, nothing is kept")])
        self.assertEqual(list(sc.check_log(self.path)), [("ok", f"call log: {self.path} will be created")])
        self.assertEqual(os.listdir(self.folder), [])
        missing = os.path.join(self.folder, "none", "calls.db")
        for path in (missing, self.folder):
            self.assertEqual(list(sc.check_log(path)), [("problem", f"call log: {path} is no file, or its folder does not exist: "
                                                         "set CALL_LOG to a file, or to off")])
        with contextlib.closing(sqlite3.connect(os.path.join(self.folder, "foreign.db"))) as foreign:
            foreign.execute("CREATE TABLE a(b)")
        self.assertRegex(list(sc.check_log(os.path.join(self.folder, "foreign.db")))[-1][1], "is not a call log of this program$")
        os.remove(os.path.join(self.folder, "foreign.db"))
        log = CallLog(self.path, 30, extension=sc.CALLS)
        self.assertEqual(list(sc.check_log(self.path))[-1], (
            "warning", "events: none yet; enter the URL in sipgate's console, choose the sources, and call"))
        for n in range(sc.FOLLOW_UPS_MISSED):
            log.record((time.time() - 65, "newCall", str(n), b"", None), 5)
        self.assertEqual([text.partition(":")[0] for _, text in sc.check_log(self.path)], ["call log", "events", "follow-ups do not arrive"])
        log.record((time.time() - 65, "hangup", "0", b"", None), 5)
        self.assertEqual(list(sc.check_log(self.path))[1:], [("ok", "events: the last one came 1:05 ago")])
        log.close(5)
        if os.name != "nt":
            os.chmod(self.path, 0o644)
            self.assertEqual(next(sc.check_log(self.path)), (
                "warning", f"call log: {self.path} can be read by others: chmod 600 {self.path}"))
        with open(self.path, "r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 9000)
        kind, text = list(sc.check_log(self.path))[-1]
        self.assertEqual(kind, "problem")
        self.assertRegex(text, "malformed|not a database|disk image")

    def test_the_basics(self):
        bad = os.path.join(self.folder, "bad.py")
        with open(bad, "w", encoding="ascii") as file:
            file.write("import sys\nsys.exit(1)\n")
        self.assertEqual(list(sc.check_basics(Settings(call_handlers=bad)))[1:], [
            ("ok", "signatures: sipgate's own example is verified"), ("ok", f"your code: {bad} compiles")])
        with open(bad, "w", encoding="ascii") as file:
            file.write("def on_new_call(event)\n")
        self.assertEqual([kind for kind, _ in sc.check_basics(Settings(call_handlers=bad, signature_key_file=bad, webhook_url="http://x.example"))],
                         ["ok", "ok", "warning", "warning", "problem", "problem"])

    def test_the_vector_is_the_one_that_sipgate_published(self):
        self.assertEqual((len(sc.VECTOR_BODY), hashlib.sha256(sc.VECTOR_BODY).hexdigest(), len(sc.VECTOR_SIGNATURE)), (
            175, "78fa0b9aa52423e998e263f3059cde974f5e22c7ae2dd67dc6bc023fd54f1d95", 684))


# ------------------------------------------------------------------------------------------
# Serving and the command line: whole programs
# ------------------------------------------------------------------------------------------

class OutputTest(unittest.TestCase):
    def test_sentences_of_the_example(self):
        for body, default, line in [
                (NEW_CALL, "", "New call from 492111234567 to 4915791234567 is ringing..."),
                (ANSWER, "", "John Doe answered call from 492111234567"),
                (b"answeringNumber=211", "answer", "211 answered call from [unknown]"),
                (b"user=&from=", "answer", "[unknown] answered call from [unknown]"),
                (HANGUP, "", "The call has been hung up (normalClearing)"),
                (b"cause=", "hangup", "The call has been hung up"),
                (DTMF, "", "[unknown] pressed 1"),
                (b"", "newCall", "New call from [unknown] to [unknown] is ringing..."),
                (b"event=pause", "", "Unknown event pause"),
                ("from=\x1b[2J\u202e&to=a\nb".encode(), "newCall",
                 "New call from \\x1b[2J\\u202e to a\\nb is ringing...")]:
            with self.subTest(line):
                self.assertEqual(sc.event_line(parse_event(body, default)), line)

    def test_json_has_sipgate_s_names(self):
        entry = json.loads(sc.event_json(parse_event(NEW_CALL + b"&mood=a&mood=b&received_at=0", ""), 1700000000.5))
        self.assertEqual(entry, {
            "received_at": "2023-11-14T22:13:20.500Z", "event": "newCall", "from": "492111234567", "to": "4915791234567",
            "direction": "in", "callId": "123456", "user": ["Alice", "Bob"], "userId": ["w0", "w1"],
            "fullUserId": ["1234567w0", "1234567w1"], "mood": ["a", "b"]})
        self.assertEqual(json.loads(sc.event_json(parse_event(ANSWER, ""), 0))["user"], "John Doe")
        self.assertEqual(json.loads(sc.event_json(parse_event(b"user=Alice", "newCall"), 0))["user"], "Alice")
        self.assertEqual(json.loads(sc.event_json(parse_event(b"", "newCall"), 0)),
                         {"received_at": "1970-01-01T00:00:00.000Z", "event": "newCall", "user": [], "userId": [], "fullUserId": []})

    def test_on_a_terminal_the_local_time_stands_first(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        for stream, pattern in [(Terminal(), r"^\d\d:\d\d:\d\d New call"), (io.StringIO(), "^New call")]:
            sc.show_on(stream, "text")(NewCallEvent(), 0)
            self.assertRegex(stream.getvalue(), pattern)

    def test_lines_of_several_threads_do_not_mix(self):
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            console = sc.Console(file)
            threads = [threading.Thread(target=lambda n=n: [print(f"<{n}", n, "\x1b>", file=console) for _ in range(50)])
                       for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print("end", end="", file=console)
            console.drain(5)
            file.seek(0)
            lines = file.read().split("\n")
        self.assertEqual(sorted(set(lines)), sorted({f"<{n} {n} \\x1b>" for n in range(4)} | {"end"}))
        self.assertEqual(len(lines), 201)

    def test_a_message_with_text_from_the_network_stays_one_line(self):
        record = logging.LogRecord("a", logging.WARNING, "", 0, "event %s", ("\x1b[2J\u202e\nERROR: forged",), None)
        formatter = sc.DiagnosticFormatter("%(levelname)s: %(message)s")
        self.assertEqual(formatter.format(record), "WARNING: event \\x1b[2J\\u202e\\nERROR: forged")
        try:
            raise ValueError("a\nERROR: forged")
        except ValueError:
            record = logging.LogRecord("a", logging.WARNING, "", 0, "event", (), sys.exc_info())
        self.assertEqual([line[:4] for line in formatter.format(record).split("\n")], ["WARN"] + ["    "] * 5)

    def test_lines_that_nobody_takes_are_dropped_and_counted(self):
        reader, writer = os.pipe()
        with open(reader, encoding="ascii") as taken, open(writer, "w", encoding="ascii") as stream:
            console = sc.Console(stream, lines=100)
            for n in range(20_000):
                print(f"{n:99}", file=console)
            lines = []
            thread = threading.Thread(target=lambda: lines.extend(taken))
            thread.start()
            console.drain(10)
            stream.close()
            thread.join()
        dropped = re.findall(r"\((\d+) lines were dropped here: nobody took them\)\n", "".join(lines))
        self.assertGreater(len(dropped), 0)
        self.assertEqual(len(lines) - len(dropped) + sum(map(int, dropped)), 20_000)


class Program:
    """The script, running in a folder of its own, and without site-packages: it needs none."""

    def __init__(self, *arguments, folder, script=SCRIPT, wait=True, stdout=subprocess.PIPE, **environ):
        clean = {name: value for name, value in os.environ.items()
                 if not re.match("WEBHOOK|CALL|VERIFY|SIGNATURE|JOURNAL|NOTIFY", name)}
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-W", "error", script, *arguments], cwd=folder, stdout=stdout, stderr=subprocess.PIPE,
            env={**clean, "WEBHOOK_PORT": "0", "CALL_LOG": "off", "PYTHONIOENCODING": "utf-8", **environ})
        self.said = ""
        while wait and "Ctrl-C stops" not in self.said:
            line = self.process.stderr.readline().decode()
            if not line:
                raise AssertionError(f"did not start: {self.said}")
            self.said += line
        if wait:
            self.port = int(re.search(r"listens on [^ ]+:(\d+)", self.said)[1])

    def post(self, path, body, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("POST", path, body, {"Content-Type": "application/x-www-form-urlencoded", **headers})
        reply = connection.getresponse()
        status, text = reply.status, reply.read().decode()
        connection.close()
        return status, text

    def end(self, with_signal=signal.SIGTERM):
        """Stop it; return exit status, stdout, all of stderr."""
        if with_signal:
            self.process.send_signal(with_signal)
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, (out or b"").decode(), self.said + err.decode()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


@unittest.skipIf(os.name == "nt", "signals")
class HangingTest(unittest.TestCase):
    """With the real time limit, which passes while other tests run."""

    @classmethod
    def begin(cls):
        cls.folder = tempfile.mkdtemp()
        unittest.addModuleCleanup(shutil.rmtree, cls.folder)
        with open(os.path.join(cls.folder, "mine.py"), "w", encoding="ascii") as file:
            file.write("import time\ndef on_new_call(event):\n    if event.call_id == 'slow':\n        time.sleep(60)\n")
        reader, writer = os.pipe()
        unittest.addModuleCleanup(os.close, reader)
        cls.program = Program(folder=cls.folder, stdout=writer, CALL_HANDLERS="mine.py")
        unittest.addModuleCleanup(cls.program.kill)
        os.close(writer)
        cls.took = []
        cls.threads = [threading.Thread(target=target) for target in (cls.slow_call, cls.many_calls)]
        for thread in cls.threads:
            thread.start()

    @classmethod
    def slow_call(cls):
        began = time.monotonic()
        with contextlib.suppress(OSError):  # with its test left out, it is ended before
            cls.program.post("/new-call", b"callId=slow")
        cls.took.append(time.monotonic() - began)

    @classmethod
    def many_calls(cls):
        connection = http.client.HTTPConnection("127.0.0.1", cls.program.port, timeout=10)
        cls.replies = 0
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            for _ in range(5000):
                connection.request("POST", "/new-call", NEW_CALL)
                cls.replies += connection.getresponse().read().startswith(b"<Response")

    def test_neither_a_stuck_reader_of_stdout_nor_code_that_hangs_delays_a_call(self):
        for thread in self.threads:
            thread.join()
        self.assertEqual(self.replies, 5000)
        self.assertLess(self.took[0], 3.2)
        status, _, err = self.program.end()
        self.assertEqual(status, 0)
        self.assertIn("mine.py\", line 4, in on_new_call", err)


@unittest.skipIf(os.name == "nt", "signals")
class ProgramTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def start(self, *arguments, **options):
        program = Program(*arguments, **{"folder": self.folder, **options})
        self.addCleanup(program.kill)
        return program

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def refused(self, program):
        """Exit status and stderr of a program that does not start."""
        status, out, err = program.end(None)
        self.assertEqual(out, "")
        self.assertNotIn("Traceback", err)
        return status, err

    def test_the_documented_examples_in_an_empty_folder(self):
        program = self.start()
        expected = (f'<Response onAnswer="http://localhost:{program.port}/on-answer" '
                    f'onHangup="http://localhost:{program.port}/on-hangup" />\n')
        for _ in range(2):
            self.assertEqual(program.post("/new-call", NEW_CALL), (200, expected))
        self.assertEqual(program.post("/on-answer", ANSWER), (200, "This response will be discarded"))
        self.assertEqual(program.post("/on-hangup", HANGUP), (200, "This response will be discarded"))
        self.assertEqual(program.post("/on-data", DTMF), (200, expected))
        self.assertEqual(program.post("/new-call", b""), (200, expected))
        status, out, err = program.end(signal.SIGINT)
        self.assertEqual(status, 0)
        self.assertEqual(out.splitlines(), [
            "New call from 492111234567 to 4915791234567 is ringing..."] * 2 + [
            "John Doe answered call from 492111234567",
            "The call has been hung up (normalClearing)",
            "[unknown] pressed 1",
            "New call from [unknown] to [unknown] is ringing..."])
        self.assertIn("ssh -R 80:127.0.0.1:", err)
        self.assertLessEqual(max(map(len, err.splitlines())), 80)

    def test_settings_come_from_flag_environment_and_file_in_this_order(self):
        self.write(".env", "WEBHOOK_URL=https://file.example/p\nCALL_OUTPUT=json\nVERIFY_SIGNATURE=on\n")
        program = self.start("--url", "https://flag.example/q", CALL_OUTPUT="off", VERIFY_SIGNATURE="")
        status, out, err = program.end()
        self.assertEqual(status, 0)
        self.assertIn("https://flag.example/q/new-call\n", err)
        self.assertIn("VERIFY_SIGNATURE is empty in the environment, which switches off the one in .env", err)
        self.assertIn("a newCall that sipgate did not sign is refused", err)
        self.assertIn(os.path.join(os.path.realpath(self.folder), ".env"), err.replace(self.folder, os.path.realpath(self.folder)))

    def test_a_signed_call_end_to_end_with_a_key_and_functions_of_ones_own(self):
        self.write("key.pem", TEST_KEY_PEM)
        self.write("mine.py", "from sipgate_callevents import NewCallEvent, dial\n"
                   "def on_new_call(event):\n    assert isinstance(event, NewCallEvent)\n"
                   "    print('deciding', event.from_number)\n    return dial('4921100')\n")
        self.write("my.env", "WEBHOOK_URL=https://x.example/p\nSIGNATURE_KEY_FILE=key.pem\nCALL_HANDLERS=mine.py\nCALL_OUTPUT=json\n")
        elsewhere = os.path.join(self.folder, "elsewhere")
        os.mkdir(elsewhere)
        renamed = shutil.copy(SCRIPT, os.path.join(elsewhere, "phone.py"))
        program = self.start("--env-file", os.path.join("..", "my.env"), folder=elsewhere, script=renamed)
        status, xml = program.post("/p/new-call", NEW_CALL, **{"X-Sipgate-Signature": sign(NEW_CALL)})
        self.assertEqual((status, ET.fromstring(xml).find("Dial/Number").text), (200, "4921100"))
        self.assertEqual(program.post("/p/new-call", NEW_CALL)[0], 403)
        self.assertEqual(program.post("/p/on-hangup", HANGUP)[0], 200)
        status, out, err = program.end()
        self.assertEqual([json.loads(line)["event"] for line in out.splitlines()], ["newCall", "hangup"])
        self.assertIn("deciding 492111234567", err)
        self.assertIn("X-Sipgate-Signature is missing", err)
        self.assertEqual(err.count("Traceback"), 0)

    @unittest.skipIf(sys.platform == "win32", "kill -9")
    def test_no_acknowledged_event_is_missing_after_kill_9(self):
        acknowledged = []
        for _ in range(3):
            began = time.monotonic()
            program = self.start(CALL_LOG="calls.db")
            self.assertEqual(program.post("/new-call", b"callId=start")[0], 200)
            self.assertLess(time.monotonic() - began, 1.5)

            def load(prefix, program=program):
                connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=10)
                with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                    for n in range(100_000):
                        connection.request("POST", "/new-call", f"callId={prefix}-{n}")
                        if connection.getresponse().read():
                            acknowledged.append(f"{prefix}-{n}")

            before = len(acknowledged)
            threads = [threading.Thread(target=load, args=(f"{before}-{n}",)) for n in range(4)]
            for thread in threads:
                thread.start()
            wait_until(lambda before=before: len(acknowledged) > before + 100)
            program.process.kill()
            for thread in threads:
                thread.join()
        program = self.start(CALL_LOG="calls.db")
        with contextlib.closing(sqlite3.connect(os.path.join(self.folder, "calls.db"))) as connection:
            stored = {row[0] for row in connection.execute("SELECT call_id FROM events")}
        self.assertEqual(set(acknowledged) - stored, set())

    def test_a_full_disk_delays_no_call_and_loses_no_event(self):
        import resource
        program = self.start(CALL_LOG="calls.db")
        wide, status, sent = b"&a=" + b"b" * 60_000, 200, []
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (1_000_000, -1))
        while status == 200:
            began = time.monotonic()
            sent.append(f"call{len(sent)}")
            self.assertEqual(program.post("/new-call", f"callId={sent[-1]}".encode() + wide)[0], 200)
            self.assertLess(time.monotonic() - began, 1.5)
            connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=10)
            connection.request("GET", "/healthz")
            reply = connection.getresponse()
            status, said = reply.status, reply.read().decode()
            connection.close()
            self.assertLess(len(sent), 100)
        self.assertRegex(said, "^the call log is behind: ")
        sent.append("last")
        program.post("/new-call", b"callId=last")
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
        status, _, err = program.end()
        self.assertEqual(status, 0)
        self.assertIn("the call log is behind (", err)
        with contextlib.closing(sqlite3.connect(os.path.join(self.folder, "calls.db"))) as connection:
            self.assertEqual([row[0] for row in connection.execute("SELECT call_id FROM events ORDER BY id")], sent)

    def test_used_up_file_descriptors_are_no_end(self):
        import resource
        program = self.start()
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (30, 30))
        idle = []
        for _ in range(36):
            idle.append(socket.create_connection(("127.0.0.1", program.port), 10))
            self.addCleanup(idle[-1].close)
        began = time.monotonic()
        self.assertEqual(program.post("/new-call", NEW_CALL)[0], 200)
        self.assertLess(time.monotonic() - began, 5)
        status, _, err = program.end()
        self.assertEqual(status, 0)
        self.assertIn("a connection could not be accepted: [Errno 24] Too many open files", err)

    def test_the_start_says_where_the_numbers_are(self):
        for events in (0, 1):
            program = self.start(CALL_LOG="", CALL_LOG_DAYS="7")
            program.post("/new-call", NEW_CALL)
            err = program.end()[2]
            self.assertIn(f"Numbers of the last 7 days are in\n  {os.path.join(os.path.realpath(self.folder), 'calls.db')}\n"
                          f"({events} events); CALL_LOG=off keeps nothing.\n",
                          err.replace(self.folder, os.path.realpath(self.folder)))

    def test_a_start_that_cannot_be_says_why_in_one_line(self):
        self.write("syntax.py", "def on_new_call(event):\n    retrun None\n")
        self.write("raises.py", "\n\nimport sys\nsys.exit('no')\n")
        self.write("empty.py", "def decide(event): pass\n")
        self.write("none_left.py", "def on_answer(): pass\n")
        self.write("async.py", "async def on_hangup(event): pass\n")
        self.write("utf16.env", "WEBHOOK_PORT=1\n".encode("utf-16"))
        self.write("latin.env", b"A=b\nB=\xe4\n")
        rows = [
                ({"WEBHOOK_PORT": "x"}, 2, 'WEBHOOK_PORT is "x": expected a whole number from 1 to 65535'),
                ({"CALL_HANDLERS": "syntax.py"}, 2, "syntax.py\": line 2: SyntaxError"),
                ({"CALL_HANDLERS": "raises.py"}, 2, "raises.py\": line 4: SystemExit: no"),
                ({"CALL_HANDLERS": "none.py"}, 2, "none.py\": FileNotFoundError: No such file or directory"),
                ({"CALL_HANDLERS": "none"}, 2, "expected the name of a Python file, ending in .py"),
                ({"CALL_HANDLERS": "empty.py"}, 2, "expected one of on_new_call, on_answer, on_hangup, on_dtmf in it"),
                ({"CALL_HANDLERS": "none_left.py"}, 2, "on_answer has to be a function of one argument, the event"),
                ({"CALL_HANDLERS": "async.py"}, 2, "on_hangup has to be a plain function, without async"),
                ({"SIGNATURE_KEY_FILE": "syntax.py"}, 2, "expected a PEM file"),
                ({"SIGNATURE_KEY_FILE": "none.pem"}, 2, "No such file"),
                ({"CALL_LOG": "latin.env"}, 2, "is not a call log of this program, and is left alone"),
                ({"CALL_LOG": "none/calls.db"}, 2, "expected a file in a folder that this user may write, or off"),
                ({"WEBHOOK_HOST": "192.0.2.1", "WEBHOOK_URL": "https://x.example/p"}, 1, "this machine has no such address"),
                ({"WEBHOOK_HOST": "no.such.invalid", "WEBHOOK_URL": "https://x.example/p"}, 1, "this machine has no such address")]
        started = [(self.start(wait=False, **environ), status, said) for environ, status, said in rows]
        for program, status, said in started:
            with self.subTest(said):
                found, err = self.refused(program)
                self.assertEqual(found, status)
                self.assertIn(said, err)
                self.assertEqual(len(err.splitlines()), 1, err)
        for name, said in [("utf16.env", "is in UTF-16, as PowerShell's > writes it: save it as UTF-8"),
                           ("latin.env", "is not in UTF-8, see line 2"), ("none.env", "cannot be read: No such file")]:
            status, err = self.refused(self.start("--env-file", name, wait=False))
            self.assertEqual((status, said in err, len(err.splitlines())), (2, True, 1), err)

    def test_a_port_in_use_ends_the_start_with_the_remedy(self):
        first = self.start()
        status, err = self.refused(self.start("--port", str(first.port), wait=False))
        self.assertEqual(status, 1)
        self.assertIn(f"cannot listen on 127.0.0.1 port {first.port}: Address already in use", err)
        self.assertIn("or use --port", err)

    def test_a_name_that_is_no_setting_is_taken_for_a_slip(self):
        self.write(".env", "VERIFY_SIGNTURE=off\nwebhookurl=x\n")
        self.write("mine.py", "def on_hangup(event): pass\ndef onAnswer(event): pass\n")
        program = self.start(WEBHOOK_PROT="1", CALL_CENTER="x", CALL_HANDLERS="mine.py")
        err = program.end()[2]
        self.assertIn("there is no setting VERIFY_SIGNTURE; is VERIFY_SIGNATURE meant?", err)
        self.assertIn("there is no setting webhookurl; is WEBHOOK_URL meant?", err)
        self.assertIn("mine.py: onAnswer is never called; is on_answer meant?", err)
        self.assertIn("there is no setting WEBHOOK_PROT; is WEBHOOK_PORT meant?", err)
        self.assertIn("there is no setting CALL_CENTER", err)

    def test_the_env_file_beside_the_script_comes_first(self):
        home, here = (os.path.join(self.folder, name) for name in ("home", "here"))
        for folder in (home, here):
            os.mkdir(folder)
        script = shutil.copy(SCRIPT, home)
        for folder in (here, home):
            with open(os.path.join(folder, ".env"), "w", encoding="ascii") as file:
                file.write("CALL_OUTPUT=off\n")
            err = self.start(folder=here, script=script).end()[2]
            self.assertIn(f"Settings are read from {os.path.join(os.path.realpath(folder), '.env')}\n",
                          err.replace(self.folder, os.path.realpath(self.folder)))

    def test_nohup_means_it(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            program = self.start()
        finally:
            signal.signal(signal.SIGHUP, before)
        program.process.send_signal(signal.SIGHUP)
        self.assertEqual(program.post("/new-call", NEW_CALL)[0], 200)
        self.assertEqual(program.end()[0], 0)

    def test_systemd_is_told_when_calls_can_come(self):
        path = os.path.join(self.folder, "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(path)
            notify.settimeout(10)
            program = self.start(NOTIFY_SOCKET=path, JOURNAL_STREAM="1:2")
            self.assertEqual(notify.recv(100), b"READY=1")
        self.assertEqual(program.end()[0], 0)

    def test_the_second_signal_ends_at_once(self):
        self.write("mine.py", "import time\ndef on_hangup(event):\n    print('begun', flush=True)\n    time.sleep(60)\n")
        program = self.start(CALL_HANDLERS="mine.py")
        program.post("/on-hangup", HANGUP)
        while program.process.stdout.readline() != b"begun\n":
            pass
        program.process.send_signal(signal.SIGTERM)
        connected = True
        while connected:  # until the first signal has closed the port
            try:
                program.post("/new-call", b"")
            except OSError:
                connected = False
        began = time.monotonic()
        self.assertEqual(program.end()[0], 128 + signal.SIGTERM)
        self.assertLess(time.monotonic() - began, 2)

    def run_command(self, *arguments, **environ):
        """Exit status, stdout and stderr of a command."""
        return self.start(*arguments, wait=False, CALL_LOG="calls.db", COLUMNS="80", **environ).end(None)

    def test_calls_while_the_server_runs(self):
        self.assertEqual(self.run_command("calls"), (0, "", f"No calls yet: there is nothing in {self.real('calls.db')}.\n"))
        self.assertEqual(os.listdir(self.folder), [])
        program = self.start(CALL_LOG="calls.db")
        for path, body in [("/new-call", NEW_CALL), ("/on-data", DTMF), ("/on-answer", ANSWER), ("/on-hangup", HANGUP)]:
            self.assertEqual(program.post(path, body)[0], 200)
        status, out, err = self.run_command("calls", "--events")
        self.assertEqual((status, err), (0, ""))
        self.assertRegex(out, r"\ASTARTED .*\n\d\d-\d\d \d\d:\d\d in \+492111234567 \+4915791234567 answered 0:00 0:00 John Doe\n"
                         r"(  \d\d:\d\d:\d\d \w+ +.*\n){4}1 call, 1 answered, 0 missed, average wait 0:00, average talk 0:00\n\Z")
        out = self.run_command("calls", "--format", "json", "--events", "--number", "4921*", "--since", "2026-01-01")[1]
        entry = json.loads(out)
        self.assertEqual((entry["from"], entry["users"], entry["digits"], [event["event"] for event in entry["events"]]),
                         ("492111234567", ["Alice", "Bob"], "1", ["newCall", "dtmf", "answer", "hangup"]))
        status, out, err = self.run_command("calls", "--format", "csv")
        self.assertEqual(out.split("\n")[0], "direction,from,to,users,answered_by,started,answered,ended,wait_s,talk_s,outcome,cause,"
                         "digits,legs")
        self.assertTrue(out.split("\n")[1].startswith("in,'492111234567,'4915791234567,Alice Bob,John Doe,2"))
        self.assertEqual(self.run_command("calls", "--missed"), (0, "", "No call matches.\n"))
        for arguments, said in [(("--since", "yesterday"), '--since is "yesterday": expected a date such as 2026-11-01'),
                                (("--limit", "0"), "expected a whole number of 1 or more"),
                                (("--since", ""), '--since is "": expected a date'),
                                (("--number", "+"), "expected digits, with * for any others"),
                                (("--number", "a'b"), "expected digits, with * for any others")]:
            status, _, err = self.run_command("calls", *arguments)
            self.assertEqual((status, said in err), (2, True), err)
        status, out, _ = program.end()
        self.assertIn("492111234567 pressed 1\n", out)
        self.assertIn("The call has been hung up (normalClearing, talked 0:00)\n", out)

    def test_a_rehearsal_from_an_empty_folder(self):
        self.write("mine.py", "from sipgate_callevents import dial\ndef on_new_call(event):\n    return dial('4921100')\n")
        began = time.monotonic()
        status, out, err = self.run_command("simulate", CALL_HANDLERS="mine.py")
        self.assertLess(time.monotonic() - began, 2)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("but your functions really run (", out.splitlines()[0])
        self.assertIn("  Dial 4921100, follow-ups to /on-answer and /on-hangup\n", out)
        self.assertRegex(out.splitlines()[-1], r"^\d\d-\d\d \d\d:\d\d in \+492111234567 \+4915791234567 answered 0:00 0:00 4921100$")
        self.assertEqual(os.listdir(self.folder), ["mine.py"])
        self.write("mine.py", "def on_new_call(event):\n    return '<Dial/>'\n")
        status, out, err = self.run_command("simulate", "missed", "--from", "anonymous", CALL_HANDLERS="mine.py")
        self.assertEqual((status, "on_new_call returned a str, not an action" in err), (1, True))
        self.assertEqual(self.run_command("simulate", "--pause", "nan")[0], 2)
        status, out, _ = self.run_command("simulate", "--user", "x" * 70_000)
        self.assertEqual((status, out.splitlines()[-1]), (1, "no call was stored"))
        self.assertEqual(self.run_command("simulate", "nonsense")[0], 2)
        program = self.start(WEBHOOK_URL="https://x.example/p")
        status, out, err = self.run_command("simulate", "--url", f"http://127.0.0.1:{program.port}/p/new-call")
        self.assertEqual((status, "(403: that server checks signatures" in out), (1, True))
        for url in ("x.example", "http://[bad/x", "http://\u00fc.example/"):
            self.assertEqual(self.run_command("simulate", "--url", url)[0], 2)

    def test_check_names_every_slip(self):
        status, out, _ = self.run_command("check", WEBHOOK_URL="x", VERIFY_SIGNATURE="x")
        self.assertEqual((status, len(out.splitlines()), out[:20]), (1, 2, "problem  WEBHOOK_URL"))
        status, out, _ = self.run_command("check", WEBHOOK_PORT=str(self.start().port))
        self.assertEqual((status, [line.split()[0] for line in out.splitlines()]), (0, ["ok", "ok", "ok", "ok", "warning"]))

    def real(self, name):
        return os.path.join(os.path.realpath(self.folder), name)

    def test_no_byte_of_a_forgotten_number_is_left(self):
        path = os.path.join(self.folder, "calls.db")
        log = CallLog(path, 30, extension=sc.CALLS)
        log.close(5)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.executemany("INSERT INTO events(received_at, event, call_id, body) VALUES (?, 'newCall', ?, ?)", (
                (time.time() - 3600 + n / 100, f"leg{n}", b"event=newCall&direction=in&callId=leg%d&from=%s&to=4930200" % (
                    n, b"49999911122" if n % 50 == 0 else b"499999111229" if n % 50 == 1 else b"49211%d" % n)) for n in range(20_000)))
            other.execute("INSERT INTO events(received_at, event, call_id, body) VALUES (?, 'answer', 'leg1', ?)", (
                time.time(), b"event=answer&callId=leg1&answeringNumber=49999911122&user=Al%C3%BC"))
            while sc.update_calls(other, 5000):
                pass
            other.execute("COMMIT")
        self.write("calls.db.damaged-1", "...49999911122...")
        self.write("calls.db.damaged-2", "...")
        with open(path, "rb") as file:
            self.assertIn(b"49999911122", file.read())
        status, out, err = self.run_command("forget", "+49 (999) 911-122")
        self.assertEqual((status, out), (0, f"401 calls held that number; it is gone from {self.real('calls.db')}\n"))
        self.assertEqual(sorted(os.listdir(self.folder)), ["calls.db", "calls.db.damaged-2"])
        with open(path, "rb") as file:
            content = file.read()
        self.assertEqual(re.findall(rb"49999911122(?!9)", content), [])
        with contextlib.closing(sqlite3.connect(path)) as other:
            self.assertEqual(other.execute("SELECT count(*) FROM calls WHERE from_number = '[forgotten]'").fetchone(), (400,))
            self.assertEqual(other.execute("SELECT count(*) FROM calls").fetchone(), (20_000,))
            self.assertEqual(other.execute("SELECT from_number FROM calls JOIN legs ON id = call WHERE call_id = 'leg1'").fetchone(),
                             ("499999111229",))
        self.assertEqual(self.run_command("forget", "49999911122")[1], f"0 calls held that number; it is gone from {self.real('calls.db')}\n")
        self.assertEqual(self.run_command("forget", "4")[0], 2)
        self.assertEqual(self.run_command("forget", "hangup")[0], 2)
        os.remove(path)
        self.write("calls.db.damaged-3", "...49999911122...")
        self.assertEqual(self.run_command("forget", "49999911122")[0], 0)
        self.assertEqual(os.listdir(self.folder), ["calls.db.damaged-2"])

    def test_help_and_version(self):
        for argument, said in [("--version", "sipgate_callevents 1."), ("-h", "--env-file FILE")]:
            status, out, _ = self.start(argument, wait=False).end(None)
            self.assertEqual(status, 0)
            self.assertIn(said, out)
        status, _, err = self.start("--nonsense", wait=False).end(None)
        self.assertEqual(status, 2)

    def test_importing_does_nothing(self):
        program = subprocess.run([sys.executable, "-W", "error", "-c", "import threading, sipgate_callevents; "
                                  "print(threading.active_count())"], cwd=HERE, capture_output=True, text=True, check=False)
        self.assertEqual((program.stdout, program.stderr), ("1\n", ""))


# ------------------------------------------------------------------------------------------
# The README and the other files
# ------------------------------------------------------------------------------------------

def text_of(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


class ReadmeTest(unittest.TestCase):
    README = text_of("README.md")
    CODE = tuple(re.findall(r"```python\n(.*?)```", README, re.DOTALL))

    def test_its_table_the_example_file_and_the_script_name_the_same_settings(self):
        table = re.findall(r"^\| `([A-Z_]+)`[^|]*\| ([^|]*?) ?\|", self.README, re.MULTILINE)
        script = [(setting.name.upper(), str(setting.default)) for setting in sc.fields(Settings)]
        self.assertEqual(table, script)
        lines = text_of(".env.example").splitlines()
        self.assertEqual([tuple(line.split("=")) for line in lines[1::2]], script)
        for comment in lines[::2]:
            self.assertRegex(comment, "^# [^#]+$")
        self.assertEqual(parse_dotenv(text_of(".env.example"), {}), dict(script))

    def test_its_functions_do_what_they_are_there_for(self):
        self.assertEqual(len(self.CODE), 2)
        mine = {}
        exec(self.CODE[0], mine)
        self.assertEqual(mine["on_new_call"](NewCallEvent(from_number="anonymous")), reject("busy"))
        self.assertEqual(mine["on_new_call"](NewCallEvent(direction="in")), voicemail())
        self.assertIsNone(mine["on_new_call"](NewCallEvent(direction="in", users=("Alice",))))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            mine["on_hangup"](HangupEvent())
            mine["on_hangup"](HangupEvent(call=ShownCallsTest.CALL))
            mine["on_hangup"](HangupEvent(call=replace(ShownCallsTest.CALL, outcome="missed", from_number="49211")))
        self.assertEqual(printed.getvalue(), "please ring back: 49211\n")
        exec(self.CODE[1], mine)
        self.assertIn(b"on-data?state=menu", response_xml(mine["on_new_call"](NewCallEvent(direction="in")), on_data="http://x/on-data"))
        self.assertEqual(mine["on_dtmf"](DtmfEvent(dtmf="1", state="menu")), dial("4915799912345", "492111234567"))
        self.assertEqual(mine["on_dtmf"](DtmfEvent(dtmf="", state="menu")), voicemail())

    def test_its_table_of_actions_has_their_signatures(self):
        for action in (dial, voicemail, play, gather, reject, hang_up):
            signature = inspect.signature(action)
            plain = signature.replace(return_annotation=signature.empty, parameters=[
                parameter.replace(annotation=signature.empty) for parameter in signature.parameters.values()])
            rows = [line.split("`")[1].replace('"', "'") for line in self.README.splitlines() if line.startswith("| `")]
            self.assertIn(f"{action.__name__}{plain}", rows)

    def test_its_json_is_what_is_printed(self):
        shown = json.loads(re.search(r"```json\n(.*?)```", self.README, re.DOTALL)[1])
        printed = json.loads(sc.event_json(parse_event(NEW_CALL, ""), 0))
        self.assertEqual({**shown, "received_at": ""}, {**printed, "received_at": ""})

    def test_its_scenarios_are_those_that_there_are(self):
        self.assertIn(f"The scenarios: {', '.join(sc.SCENARIOS)}.", self.README)

    def test_the_licence_is_the_unlicense(self):
        self.assertIn("SPDX-License-Identifier: Unlicense", text_of("sipgate_callevents.py"))
        self.assertTrue(self.README.rstrip().endswith("please refer to <https://unlicense.org/>"))


if __name__ == "__main__":
    unittest.main()
