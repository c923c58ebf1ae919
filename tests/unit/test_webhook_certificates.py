"""The life of the webhook's certificates, over simulated years and with real handshakes."""

import base64
import datetime as dt
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from refold_operator.webhook.certificates import Certificates, Lifetimes, bundle, decode, encode, renewed

HOST = "refold-webhook.refold-system.svc"
LIFETIMES = Lifetimes(dt.timedelta(days=365), dt.timedelta(days=90), dt.timedelta(hours=1))
BEGIN = dt.datetime(2026, 1, 1, 12, 30, 15, 987654, tzinfo=dt.UTC)


def step(found: Certificates, now: dt.datetime, trusted: str | None = None) -> Certificates:
    return renewed(
        found, host=HOST, now=now, lifetimes=LIFETIMES, trusted=bundle(found) if trusted is None else trusted
    )


def first() -> Certificates:
    return step(Certificates(), BEGIN)


def shown_to(client: str, certificates: Certificates, folder: Path) -> bool:
    """Tell whether a client that trusts the bundle `client` accepts the serving certificate, by a handshake."""
    assert certificates.serving is not None
    pair = folder / "pair.pem"
    pair.write_text(certificates.serving.key_pem + certificates.serving.pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(cadata=client)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        trusting.wrap_bio(to_client, to_server, server_hostname=HOST),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    done = [False, False]
    for _ in range(10):
        for i, end in enumerate(ends):
            try:
                end.do_handshake()
                done[i] = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                return False
    return all(done)


def test_from_nothing_there_is_an_authority_and_what_it_signed(tmp_path: Path) -> None:
    # the handshake is of today
    made = renewed(Certificates(), host=HOST, now=dt.datetime.now(dt.UTC), lifetimes=LIFETIMES, trusted="")
    assert len(made.authorities) == 1
    assert shown_to(bundle(made), made, tmp_path)
    other = renewed(Certificates(), host=HOST, now=dt.datetime.now(dt.UTC), lifetimes=LIFETIMES, trusted="")
    assert not shown_to(bundle(other), made, tmp_path)


def test_what_is_young_stays_as_it_is() -> None:
    made = first()
    assert step(made, BEGIN + dt.timedelta(days=59)) == made


def test_a_serving_certificate_is_renewed_after_two_thirds_of_its_life_by_the_same_authority() -> None:
    made = first()
    later = step(made, BEGIN + dt.timedelta(days=61))
    assert later.authorities == made.authorities
    assert later.serving != made.serving


def test_a_serving_certificate_of_another_name_is_replaced() -> None:
    made = first()
    moved = renewed(made, host="other.ns.svc", now=BEGIN, lifetimes=LIFETIMES, trusted=bundle(made))
    assert moved.authorities == made.authorities
    assert moved.serving != made.serving


def test_an_authority_is_replaced_in_three_steps() -> None:
    old = first()
    due = BEGIN + dt.timedelta(days=250)
    both = step(old, due)
    assert both.authorities[0] == old.authorities[0]
    assert len(both.authorities) == 2
    assert both.serving is not None
    assert old.authorities[0].certificate.subject == both.serving.certificate.issuer
    assert step(both, due + dt.timedelta(minutes=59)) == both, "the API server may not have seen it yet"

    signed = step(both, due + dt.timedelta(minutes=61))
    assert signed.authorities == both.authorities
    assert signed.serving is not None
    assert signed.serving.certificate.issuer == both.authorities[1].certificate.subject
    assert step(signed, due + dt.timedelta(minutes=119)) == signed, "a replica may still show the former one"

    alone = step(signed, due + dt.timedelta(minutes=122))
    assert alone == Certificates(both.authorities[1:], signed.serving)


def test_an_authority_that_the_api_server_was_not_told_signs_nothing() -> None:
    old = first()
    due = BEGIN + dt.timedelta(days=250)
    both = step(old, due)
    later = step(both, due + dt.timedelta(days=2), trusted=bundle(old))
    assert later.authorities == both.authorities
    assert later.serving is not None
    assert later.serving.certificate.issuer == old.authorities[0].certificate.subject


def test_whoever_knows_one_of_the_last_two_bundles_is_always_shown_what_it_trusts() -> None:
    """Three years, looked at irregularly: no bundle that was told within the overlap misses the one that signed."""
    found, now = first(), BEGIN
    known = [bundle(found)]
    rotations = 0
    for hours in [17, 3, 1, 40, 0.5] * 400:
        now += dt.timedelta(hours=hours)
        following = step(found, now)
        assert following.serving is not None
        assert found.serving is not None
        issuers = {serving.certificate.issuer for serving in (found.serving, following.serving)}
        for told in (known[-1], bundle(following)):
            subjects = {each.subject for each in x509.load_pem_x509_certificates(told.encode())}
            assert issuers <= subjects or bundle(following) != told, "a rotation lost one that is still shown"
            assert found.serving.certificate.issuer in subjects, "who still shows the former one is trusted"
        rotations += following.serving.certificate.issuer != found.serving.certificate.issuer
        known.append(bundle(following))
        assert following.serving.ends > now
        assert len(following.authorities) <= 2
        found = following
    assert rotations >= 3


@pytest.mark.parametrize("years", [1, 10])
def test_after_a_long_sleep_everything_is_made_anew(years: int) -> None:
    now = BEGIN + dt.timedelta(days=366 * years)
    awake = step(first(), now)
    assert len(awake.authorities) == 1
    assert awake.serving is not None
    assert awake.serving.ends > now
    assert awake.authorities[0].ends > now


def test_the_secret_gives_back_what_was_put_into_it() -> None:
    both = step(first(), BEGIN + dt.timedelta(days=250))
    again = decode(encode(both))
    assert encode(again) == encode(both)
    assert step(again, BEGIN + dt.timedelta(days=250)) == again


def test_an_empty_secret_holds_nothing() -> None:
    assert decode({}) == Certificates()
    assert encode(Certificates()) == dict.fromkeys(["ca.crt", "ca.key", "tls.crt", "tls.key"], "")


@pytest.mark.parametrize("entry", ["ca.crt", "ca.key", "tls.crt", "tls.key"])
@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_secret_that_somebody_spoilt_is_made_anew_or_mended(entry: str, text: str) -> None:
    spoilt = encode(first()) | {entry: base64.b64encode(text.encode()).decode()}
    found = decode(spoilt)
    mended = step(found, BEGIN)
    assert mended.serving is not None
    assert mended.serving.certificate.issuer in {each.certificate.subject for each in mended.authorities}


def test_a_key_of_another_certificate_is_not_taken() -> None:
    made = encode(first())
    found = decode(made | {"tls.key": encode(first())["tls.key"]})
    assert found.serving is None
    assert bundle(found) == bundle(decode(made)), "the authority stays"
    assert decode(made | {"ca.key": encode(first())["ca.key"]}).authorities == ()
