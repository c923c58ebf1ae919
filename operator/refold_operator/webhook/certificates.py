"""Which certificates the webhook has: authorities of its own, and a serving certificate that one of them signed.

`renewed` is the whole life of them as a pure function from what there is and the time to what there should be. An
authority is replaced without a gap, however often processes die in between:

1. the next authority is made; the API server is told both (`bundle`), the former one still signs;
2. when the API server has known it for the overlap, it signs a new serving certificate;
3. when that has been served for the overlap, so that every replica has it, the former authority is forgotten.
"""

import base64
import datetime as dt
from collections.abc import Mapping
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: Certificates are good from a little before they are made, for clocks that are behind.
_SKEW = dt.timedelta(minutes=5)
#: The part of its life after which one is replaced.
_OLD = 2 / 3

_KEY_END = b"-----END PRIVATE KEY-----\n"
_CA_CERTIFICATES, _CA_KEYS, _CERTIFICATE, _KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"


class Lifetimes(NamedTuple):
    """How long each is good, and for how long two authorities are good side by side at either end."""

    authority: dt.timedelta
    certificate: dt.timedelta
    overlap: dt.timedelta


class Pair(NamedTuple):
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def made(self) -> dt.datetime:
        """When it was made."""
        return self.certificate.not_valid_before_utc + _SKEW

    @property
    def ends(self) -> dt.datetime:
        """Until when it is good."""
        return self.certificate.not_valid_after_utc

    @property
    def pem(self) -> str:
        """The certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def key_pem(self) -> str:
        """The private key as PEM (PKCS #8), without a password."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def old(self, now: dt.datetime) -> bool:
        """Tell whether it is time for another one."""
        return now >= self.made + (self.ends - self.made) * _OLD


class Certificates(NamedTuple):
    """What the webhook's Secret holds.

    Attributes:
        authorities: those that the API server has to trust, the oldest first.
        serving: what the webhook shows, None before the first one.
    """

    authorities: tuple[Pair, ...] = ()
    serving: Pair | None = None


def renewed(found: Certificates, *, host: str, now: dt.datetime, lifetimes: Lifetimes, trusted: str) -> Certificates:
    """Return what there should be; the same as `found` where nothing is due.

    Args:
        found: what there is.
        host: the DNS name that the serving certificate is for.
        now: the time, aware.
        lifetimes: how long each is good.
        trusted: the bundle that the API server is told at present, as PEM.
    """
    authorities = [authority for authority in found.authorities if now < authority.ends]
    if not authorities or authorities[-1].old(now):
        authorities.append(_authority(now, lifetimes.authority))

    known = [
        authority for authority in authorities if authority.made + lifetimes.overlap <= now and authority.pem in trusted
    ]
    signer = known[-1] if known else authorities[0]

    serving = found.serving
    if (
        serving is None
        or not _signed(serving, signer)
        or _host(serving) != host
        # one that ends with its authority can't be replaced by one that lasts longer
        or (serving.old(now) and not (serving.ends == signer.ends and now < signer.ends))
    ):
        serving = _serving(signer, host, now, lifetimes.certificate)

    if serving.made + lifetimes.overlap <= now:
        authorities = authorities[authorities.index(signer) :]
    return Certificates(tuple(authorities), serving)


def bundle(certificates: Certificates) -> str:
    """Return the authorities' certificates as PEM, the oldest first: whom the API server has to trust."""
    return "".join(authority.pem for authority in certificates.authorities)


def encode(certificates: Certificates) -> dict[str, str]:
    """Return the `data` of the Secret."""
    texts = {
        _CA_CERTIFICATES: bundle(certificates),
        _CA_KEYS: "".join(authority.key_pem for authority in certificates.authorities),
        _CERTIFICATE: certificates.serving.pem if certificates.serving else "",
        _KEY: certificates.serving.key_pem if certificates.serving else "",
    }
    return {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}


def decode(data: Mapping[str, str]) -> Certificates:
    """Return what `encode` made `data` of; what is missing, or is something else, is made anew by `renewed`."""
    serving = _pairs(data, _CERTIFICATE, _KEY)
    return Certificates(_pairs(data, _CA_CERTIFICATES, _CA_KEYS), serving[0] if serving else None)


def _pairs(data: Mapping[str, str], certificates: str, keys: str) -> tuple[Pair, ...]:
    """Return certificates and keys that stand in the same order in two entries; none where they don't fit."""
    try:
        texts = [base64.b64decode(data.get(name) or "", validate=True) for name in (certificates, keys)]
        if not texts[0]:
            return ()
        parts = [part + _KEY_END for part in texts[1].split(_KEY_END)[:-1]]
        private = [serialization.load_pem_private_key(part, None) for part in parts]
        pairs = zip(x509.load_pem_x509_certificates(texts[0]), private, strict=True)
        return tuple(Pair(certificate, _fitting(key, certificate)) for certificate, key in pairs)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return ()


def _fitting(key: object, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("the key isn't the certificate's")
    return key


def _authority(now: dt.datetime, life: dt.timedelta) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # each has a name of its own, by which a verifier finds the one that signed
    name = _name(f"refold-webhook-ca-{x509.random_serial_number():x}"[:64])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _certificate(key, name, now, now + life)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate, key)


def _serving(signer: Pair, host: str, now: dt.datetime, life: dt.timedelta) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _certificate(key, _name("refold-webhook"), now, min(now + life, signer.ends))
        .issuer_name(signer.certificate.subject)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        .sign(signer.key, hashes.SHA256())
    )
    return Pair(certificate, key)


def _certificate(
    key: ec.EllipticCurvePrivateKey, name: x509.Name, now: dt.datetime, ends: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.replace(microsecond=0) - _SKEW)
        .not_valid_after(ends.replace(microsecond=0))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _signed(serving: Pair, signer: Pair) -> bool:
    try:
        serving.certificate.verify_directly_issued_by(signer.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _host(serving: Pair) -> str:
    """Return the DNS name that a serving certificate is for, or nothing."""
    try:
        names = serving.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    return ",".join(names.get_values_for_type(x509.DNSName))
