"""Join tokens, and how often one may try them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire.certs.attempts import Attempts
from gradwire.certs.tokens import JoinToken, TokenBook
from gradwire_protocol.errors import LimitExceeded, NotAllowed, SettingsError
from gradwire_protocol.roles import Role

FINGERPRINT = bytes(range(32))


@pytest.fixture
def now():
    return [1_000_000.0]


@pytest.fixture
def book(tmp_path, now):
    return TokenBook(tmp_path, clock=lambda: now[0])


def test_a_token_is_used_once(book, tmp_path):
    token = book.make(role=Role.STAGE, fingerprint=FINGERPRINT)
    assert JoinToken.parse(str(token)) == token
    assert book.use(JoinToken.parse(f" {token}\n"), "a", ["10.0.0.7"]) is Role.STAGE
    with pytest.raises(NotAllowed, match="has been used"):
        book.use(token, "a", ["10.0.0.7"])
    with pytest.raises(NotAllowed, match="has been used"):
        TokenBook(tmp_path, clock=lambda: 1_000_000.0).use(token, "a", [])


def test_a_token_may_be_used_so_often(book):
    token = book.make(role=Role.STAGE, fingerprint=FINGERPRINT, uses=3)
    for _ in range(3):
        book.use(token, "a", [])
    with pytest.raises(NotAllowed, match="has been used"):
        book.use(token, "a", [])


def test_a_token_expires(book, now):
    token = book.make(role=Role.STAGE, fingerprint=FINGERPRINT, seconds=60)
    now[0] += 61
    with pytest.raises(NotAllowed, match="expired"):
        book.use(token, "a", [])
    now[0] += 2 * 24 * 3600
    book.make(role=Role.STAGE, fingerprint=FINGERPRINT)
    with pytest.raises(NotAllowed, match="not known"):
        book.use(token, "a", [])


def test_a_token_is_for_its_role_name_and_addresses(book):
    token = book.make(role=Role.STAGE, fingerprint=FINGERPRINT, name="gpu-1", addresses=["gpu-1.lab", "10.0.0.7"])
    forged = JoinToken(
        role=Role.COORDINATOR, identifier=token.identifier, secret=token.secret, fingerprint=token.fingerprint
    )
    for wrong, name, addresses, message in (
        (forged, "gpu-1", [], "made for the role stage, not coordinator"),
        (token, "gpu-2", [], "made for the name gpu-1"),
        (token, "gpu-1", ["10.0.0.7", "10.0.0.1"], r"not for 10\.0\.0\.1, but"),
    ):
        with pytest.raises(NotAllowed, match=message):
            book.use(wrong, name, addresses)
    assert book.use(token, "gpu-1", ["10.0.0.7"]) is Role.STAGE


def test_who_does_not_know_the_secret_learns_nothing(book, now):
    token = book.make(role=Role.STAGE, fingerprint=FINGERPRINT, seconds=60)
    guessed = JoinToken(role=Role.STAGE, identifier=token.identifier, secret=bytes(25), fingerprint=FINGERPRINT)
    unknown = JoinToken(role=Role.STAGE, identifier="00" * 6, secret=bytes(25), fingerprint=FINGERPRINT)
    messages = set()
    for wrong in (guessed, unknown):
        with pytest.raises(NotAllowed) as caught:
            book.use(wrong, "a", [])
        messages.add(str(caught.value))
    now[0] += 61
    with pytest.raises(NotAllowed) as caught:
        book.use(guessed, "a", [])
    assert {*messages, str(caught.value)} == messages
    assert len(messages) == 1


def test_secrets_are_not_kept(book, tmp_path):
    token = book.make(role=Role.STAGE, fingerprint=FINGERPRINT)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "tokens").iterdir())
    assert token.secret.hex().encode() not in kept
    assert str(token).encode() not in kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gradwire",
        "gradwire.stage",
        "gradwire.stage.",
        "gradwire.stage.AAAA",
        "gradwire.enrolment." + "A" * 84,
        "gradwire.root." + "A" * 84,
        "gradwire.stage." + "A" * 83,
        "gradwire.stage." + "A" * 88,
        "gradwire.stage." + "?" * 84,
        "gradwire.stage." + "A" * 84 + ".x",
        "other.stage." + "A" * 84,
        "x" * 100_000,
    ],
)
def test_what_is_no_token_is_told(text):
    with pytest.raises(SettingsError, match="Not a join token"):
        JoinToken.parse(text)


@given(st.text(max_size=120))
def test_any_other_text_is_no_token(text):
    with pytest.raises(SettingsError):
        JoinToken.parse("gradwire.stage." + text + "!")


def test_attempts_are_limited_and_come_back():
    now = [0.0]
    attempts = Attempts(each=3, together=5, clock=lambda: now[0])
    for _ in range(3):
        attempts.count("a")
    for _ in range(4):
        with pytest.raises(LimitExceeded, match="Too many attempts"):
            attempts.count("a")
    attempts.count("b")
    attempts.count("b")
    with pytest.raises(LimitExceeded):
        attempts.count("b")
    now[0] += 20
    attempts.count("a")
    with pytest.raises(LimitExceeded):
        attempts.count("a")


def test_callers_that_are_remembered_are_bounded():
    attempts = Attempts(each=1, together=10**9, clock=lambda: 0.0)
    for number in range(10_000):
        attempts.count(str(number))
    assert len(attempts._callers) <= 4096
