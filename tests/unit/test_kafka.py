"""How a process reaches Kafka: which settings librdkafka gets of which files, and what is told where it may not."""

import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from refold.kafka import Brokers, CredentialsError, Settings

AT = "FAIL [rdkafka#producer-1] [thrd:sasl_ssl://kafka:9093/bootstrap]: sasl_ssl://kafka:9093/bootstrap:"


def brokers(folder: Path, protocol: str, **more: Any) -> Brokers:
    return Settings(
        kafka_bootstrap="kafka:9093", kafka_security_protocol=protocol, kafka_credentials=folder, **more
    ).brokers()  # fmt: skip


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def hear(brokers: Brokers, message: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Let librdkafka say something; return what comes to the log of it."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        brokers.config()["logger"].log(logging.ERROR, message)
    return [record.getMessage() for record in caplog.records]


def test_without_security_nothing_but_the_address_is_set() -> None:
    config = Settings(kafka_bootstrap="kafka:9092").brokers().config()
    config.pop("logger")
    assert config == {
        "bootstrap.servers": "kafka:9092", "security.protocol": "PLAINTEXT", "reconnect.backoff.max.ms": 1000,
    }  # fmt: skip


def test_a_strimzi_users_secret_works_as_it_is(tmp_path: Path) -> None:
    scram, mtls = tmp_path / "scram", tmp_path / "mtls"
    scram.mkdir()
    mtls.mkdir()
    (tmp_path / "cluster-ca.crt").write_text("CLUSTER CA")
    write(scram, password="secret\n")
    (scram / "sasl.jaas.config").write_text("…")
    config = brokers(
        scram, "SASL_SSL", kafka_username="the-secrets-name", kafka_ca=tmp_path / "cluster-ca.crt"
    ).config()
    assert config["sasl.username"] == "the-secrets-name"
    assert config["sasl.password"] == "secret"
    assert config["ssl.ca.pem"] == "CLUSTER CA"
    write(mtls, ca_crt="CLIENTS CA", user_crt="CERTIFICATE", user_key="KEY", user_p12="…")
    config = brokers(mtls, "SSL", kafka_ca=tmp_path / "cluster-ca.crt").config()
    assert (config["ssl.ca.pem"], config["ssl.certificate.pem"], config["ssl.key.pem"]) == (
        "CLUSTER CA", "CERTIFICATE", "KEY",
    )  # fmt: skip
    assert not any(name.startswith("sasl") for name in config)


def test_files_are_read_for_each_client(tmp_path: Path) -> None:
    write(tmp_path, username="relay", password="one")
    known = brokers(tmp_path, "SASL_PLAINTEXT", kafka_sasl_mechanism="PLAIN")
    before = known.fingerprint()
    assert known.config()["sasl.password"] == "one"
    assert known.fingerprint() == before
    write(tmp_path, password="two")
    assert known.config()["sasl.password"] == "two"
    assert known.fingerprint() != before


@pytest.mark.parametrize(
    ("protocol", "files", "missing"),
    [
        ("SASL_SSL", {"username": "relay"}, "password"),
        ("SASL_SSL", {"password": "x"}, "username"),
        ("SASL_SSL", {"username": "relay", "password": "\n"}, "password"),
        ("SSL", {"user_crt": "x"}, "user.key"),
        ("SSL", {"user_key": "x"}, "user.crt"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, protocol: str, files: dict[str, str], missing: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(CredentialsError, match=f"{tmp_path}/{missing} is missing"):
        brokers(tmp_path, protocol).config()


def test_a_named_authority_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="REFOLD_KAFKA_CA"):
        brokers(tmp_path, "SSL", kafka_ca=tmp_path / "none").config()


def test_sasl_without_credentials_is_refused() -> None:
    with pytest.raises(ValidationError, match="REFOLD_KAFKA_CREDENTIALS"):
        Settings(kafka_bootstrap="kafka:9092", kafka_security_protocol="SASL_SSL")


@pytest.mark.parametrize(
    ("said", "reason", "words"),
    [
        (
            "SASL authentication error: Authentication failed during authentication due to invalid credentials with "
            "SASL mechanism SCRAM-SHA-512 (after 319ms in state AUTH_REQ)",
            "AuthenticationFailed", "password",
        ),
        (
            "SSL handshake failed: error:0A000086:SSL routines::certificate verify failed: broker certificate could "
            "not be verified, verify that ssl.ca.location is correctly configured or root CA certificates are "
            "installed (install ca-certificates package) (after 11ms in state SSL_HANDSHAKE)",
            "CertificateUnknown", "ca.crt",
        ),
        (
            "Receive failed: error:0A000412:SSL routines::ssl/tls alert bad certificate: SSL alert number 42 (after "
            "1ms in state APIVERSION_QUERY)",
            "CertificateRefused", "user.crt",
        ),
        (
            "Disconnected: connection closed by peer: receive 0 after POLLIN (after 6ms in state APIVERSION_QUERY)",
            "ConnectionClosed", "SASL_SSL?",
        ),
        (
            "SSL handshake failed: Disconnected: SSL connection closed by peer: connecting to a PLAINTEXT broker "
            "listener? (after 5ms in state SSL_HANDSHAKE)",
            "ConnectionClosed", "SASL_SSL?",
        ),
        ("Connect to ipv4#127.0.0.1:9 failed: refused (after 0ms in state CONNECT)", "Unreachable", "refused"),
    ],
)  # fmt: skip
def test_a_failed_connection_is_told_once_in_plain_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str, reason: str, words: str
) -> None:
    write(tmp_path, username="relay", password="secret")
    known = brokers(tmp_path, "SASL_SSL")
    assert known.trouble() is None
    (told,) = hear(known, f"{AT} {said}", caplog)
    trouble = known.trouble()
    assert trouble is not None
    assert trouble.reason == reason
    assert trouble.message in told
    assert "kafka:9093" in told
    assert words in told
    assert not hear(known, f"{AT} {said}", caplog), "the same isn't said again at once"


def test_the_end_of_an_idle_connection_is_no_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, username="relay", password="secret")
    known = brokers(tmp_path, "SASL_SSL")
    assert not hear(known, f"{AT} Disconnected: connection closed by peer (after 600001ms in state UP)", caplog)
    assert known.trouble() is None
