"""Enrolment of devices: one-time tokens, certificates for their keys, renewal, revocation."""

import hashlib
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509

from fleet.ca import BadRequestError, CertificateAuthority, DeviceKey, key_der, read_request, serial
from fleet.protocol import names
from fleet.protocol.messages import EXPIRED, OUTDATED, REVOKED, Enrolled, EnrolRequest, RenewReply, Token
from fleet.protocol.operator_api import EnrollTokenReply, EnrollTokenRequest, Refusal
from fleet.server.config import ServerConfig
from fleet.server.device_budget import RequestBudget
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow, TokenRow
from fleet.store.store import Store

VALID_MIN_S: Final = 60
VALID_MAX_S: Final = 30 * 86_400
_SECRET_BYTES: Final = 32
_RENEW: Final = "renew it: POST /v1/renew"
PROOF_MAX_CHARS: Final = 2000
_ANOTHER: Final = "make another with fleet enroll-token"


class Enrolment:
    """Enrolment of devices and renewal of their certificates."""

    def __init__(
        self,
        *,
        store: Store,
        ca: CertificateAuthority,
        repository: TufRepository,
        config: ServerConfig,
        clock: Callable[[], datetime],
        budget: RequestBudget,
    ) -> None:
        self._budget = budget
        self._store, self._ca, self._repository, self._config, self._clock = store, ca, repository, config, clock

    def make_token(self, request: EnrollTokenRequest, *, by: str) -> EnrollTokenReply:
        """Create a one-time token for one device.

        Raises:
            Refusal: the validity is out of range.
            BadNameError: the group is not a name.
        """
        if not VALID_MIN_S <= request.valid_s <= VALID_MAX_S:
            raise Refusal(400, "bad-request", f"a token is valid for {VALID_MIN_S} s to {VALID_MAX_S // 86_400} days")
        now = self._clock()
        expires = (now + timedelta(seconds=request.valid_s)).replace(microsecond=0)
        root_sha256 = hashlib.sha256(self._repository.newest_root).hexdigest()
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        if request.group:
            names.check_label(request.group, "group")
            group = self._store.devices.group(request.group)
            if group is not None and group.selector:
                raise Refusal(
                    409, "selector-group", f"{group.name} chooses its devices by labels", action="label the device"
                )
        with self._store.atomic():
            if request.group:
                self._store.devices.ensure_group(request.group, now=now.timestamp())
            self._store.access.add_token(
                secret,
                group=request.group,
                root_sha256=root_sha256,
                expires=expires.timestamp(),
                by=by,
                now=now.timestamp(),
            )
            self._store.access.audit(actor=by, act="make-token", subject=request.group, now=now.timestamp())
        token = Token(
            url=self._config.operators_url,
            fleet=self._config.fleet,
            ca_sha256=self._ca.sha256,
            root_sha256=root_sha256,
            floor=now.replace(microsecond=0),
            expires=expires,
            secret=secret,
            group=request.group,
        )
        return EnrollTokenReply(token=token.encode(), group=request.group, expires=expires)

    def enrol(self, request: EnrolRequest) -> Enrolled:
        """Enrol a device. A device that missed the reply may repeat the request with the same token and key.

        Raises:
            Refusal: an unknown, used or expired token, a bad request, or a key that is enrolled already.
            BadNameError: the name is invalid.
        """
        now = self._clock()
        token = self._check_token(request.secret, now)
        names.check_label(request.name, "device name")
        try:
            key = read_request(request.csr_pem)
        except BadRequestError as error:
            raise Refusal(400, "bad-request", str(error)) from error
        der = key_der(key)
        device = names.device_id(request.name, der)
        root = self._repository.root_by_hash(token.root_sha256)
        if root is None:
            raise Refusal(410, "token-outdated", "the token pins a root that is not served any more", action=_ANOTHER)
        self._budget.check_certificate(device)
        issued = self._ca.device(key, device, now=now)
        with self._store.atomic():
            if token.used_at is None:
                self._admit(request, token, device, hashlib.sha256(der).hexdigest(), now.timestamp())
            elif token.device != device:
                raise Refusal(403, "token-used", f"this token was used by {token.device}", action=_ANOTHER)
            self._store.access.add_certificate(
                serial=issued.serial,
                device=device,
                not_after=issued.not_after.timestamp(),
                pem=issued.pem,
                now=now.timestamp(),
            )
        return Enrolled(
            device=device,
            fleet=self._config.fleet,
            group=token.group,
            certificate_pem=issued.pem,
            ca_pem=self._ca.pem,
            root=root.decode(),
            devices_url=self._config.devices_url,
            mqtt=self._config.mqtt_urls,
            production=self._config.production,
        )

    def _check_token(self, secret: str, now: datetime) -> TokenRow:
        token = self._store.access.token(secret)
        if token is None:
            raise Refusal(403, "token-unknown", "this server does not know that token", action=_ANOTHER)
        if token.expires <= now.timestamp():
            raise Refusal(403, "token-expired", "the token has expired", action=_ANOTHER)
        return token

    def _admit(self, request: EnrolRequest, token: TokenRow, device: str, key_sha256: str, now: float) -> None:
        added = self._store.devices.add(
            device=device,
            name=request.name,
            machine=request.machine[:200],
            sealing_key=request.sealing_key[:200],
            key_sha256=key_sha256,
            group=token.group,
            now=now,
        )
        if not added:
            raise Refusal(
                409,
                "device-exists",
                f"{device} is enrolled already",
                "another device has the same key: a copied image, or the same state directory",
                "remove the identity of one of them, and enrol it anew",
            )
        self._store.devices.set_sealing_proof(device, request.sealing_proof[:PROOF_MAX_CHARS])
        self._store.access.use_token(request.secret, device=device, now=now)
        self._store.devices.note(device, "enrolled", f"enrolled by a token for group {token.group or 'none'}", now=now)
        self._store.access.audit(actor=device, act="enrol", subject=device, detail=token.group, now=now)

    def authenticate(self, certificate: x509.Certificate | None, *, renewing: bool = False) -> DeviceRow:
        """Return the device that presents a certificate, verified by TLS against the CA (its dates are checked here).

        Raises:
            Refusal: no certificate, or an unknown, revoked or expired one (expired ones may still renew); or the device
                asks too often.
        """
        if certificate is None:
            raise Refusal(401, "unauthorised", "a client certificate is needed")
        known = self._store.access.certificate(serial(certificate))
        device = self._by_key(certificate)
        if device is None or (known is not None and known.device != device.id):
            raise Refusal(
                403, "unknown-device", "this certificate belongs to no device", action="enrol the device again"
            )
        if device.revoked or (known is not None and known.revoked):
            raise Refusal(403, REVOKED, f"{device.id} is revoked")
        self._budget.check_request(device.id)
        if known is None or not self._ca.accepts(certificate):
            if renewing:  # the enrolled key suffices: an attacker with a stolen issuing CA does not have it
                return device
            raise Refusal(403, OUTDATED, "this certificate is of an issuing CA that is accepted no more", action=_RENEW)
        if certificate.not_valid_after_utc <= self._clock() and not renewing:
            raise Refusal(403, EXPIRED, "the certificate has expired", action=_RENEW)
        return device

    def _by_key(self, certificate: x509.Certificate) -> DeviceRow | None:
        """Return the device of a client by its key, which TLS verified; None where name and key do not match."""
        called = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        device = self._store.devices.get(str(called[0].value)) if len(called) == 1 else None
        key = certificate.public_key()
        if device is None or not isinstance(key, DeviceKey):
            return None
        return device if hashlib.sha256(key_der(key)).hexdigest() == device.key_sha256 else None

    def renew(self, device: DeviceRow, csr_pem: str, sealing_proof: str = "") -> RenewReply:
        """Issue a new certificate for the device's enrolled key.

        Raises:
            Refusal: the request is for another key, or the device was given too many certificates.
        """
        now = self._clock()
        try:
            key = read_request(csr_pem)
        except BadRequestError as error:
            raise Refusal(400, "bad-request", str(error)) from error
        if hashlib.sha256(key_der(key)).hexdigest() != device.key_sha256:
            raise Refusal(403, "other-key", "a renewal is for the key that was enrolled", action="enrol a new key anew")
        self._budget.check_certificate(device.id)
        issued = self._ca.device(key, device.id, now=now)
        with self._store.atomic():
            if sealing_proof:
                self._store.devices.set_sealing_proof(device.id, sealing_proof[:PROOF_MAX_CHARS])
            self._store.access.add_certificate(
                serial=issued.serial,
                device=device.id,
                not_after=issued.not_after.timestamp(),
                pem=issued.pem,
                now=now.timestamp(),
            )
            self._store.devices.note(device.id, "renewed", "its certificate was renewed", now=now.timestamp())
        return RenewReply(certificate_pem=issued.pem, ca_pem=self._ca.pem)
