"""Settings of a node: flags over `SHOAL_*` environment over a TOML file over defaults.

The command line gives only the flags that were typed; pydantic-settings finds the rest. A Settings that exists is
valid: what contradicts is refused where it is built.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import platformdirs
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from node.machine import usable_cores

CONFIG_FILENAME = "config.toml"
KEY_FILENAME = "node.key"
"""In `data_dir`: the node's identity."""
ENV_PREFIX = "SHOAL_"


class ConfigError(ValueError):
    """Raised when settings are wrong; the message names the setting, what it was and what it takes."""


class Address(NamedTuple):
    """A host and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `HOST:PORT`; an IPv6 host stands in brackets. Raises ValueError."""
        host, separator, port = text.strip().rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host, int(port))


class Assignment(NamedTuple):
    """Shards of one model that a node loads at its start."""

    model: str
    shard_ids: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Assignment:
        """Read `MODEL:ID[,ID...]`. Raises ValueError."""
        model, separator, ids = text.strip().rpartition(":")
        try:
            shard_ids = tuple(int(one) for one in ids.split(","))
        except ValueError:
            shard_ids = ()
        if not separator or not model or not shard_ids or min(shard_ids) < 0:
            raise ValueError(f"{text!r} is not MODEL:ID[,ID...]")
        return cls(model, shard_ids)


def _split_words(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


def _addresses(value: Any) -> Any:
    words = _split_words(value.replace(",", " ") if isinstance(value, str) else value)
    return tuple(Address.parse(word) if isinstance(word, str) else word for word in words)


def _texts(value: Any) -> Any:
    words = _split_words(value)
    return tuple(words) if isinstance(words, list) else words


def _assignments(value: Any) -> Any:
    return tuple(Assignment.parse(word) if isinstance(word, str) else word for word in _split_words(value))


Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_texts)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
PortOrFree = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """All settings of `serve`. Ports of 0 mean a free one; limits of 0 mean none."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    config: Path | None = None
    """The TOML file that was given; without one, the user's, if there is one."""
    data_dir: Folder = Field(default_factory=lambda: Path(platformdirs.user_data_dir("shoal", appauthor=False)))
    """Key, index of hashes, resume data, and the lock."""
    shards_dir: Folder = Path()
    """Where shards lie and fetched ones land; DATA_DIR/shards unless given."""
    cluster: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] = "default"
    assign: Annotated[tuple[Assignment, ...], NoDecode, BeforeValidator(_assignments)] = ()
    listen: str = "127.0.0.1"
    """Address that RPC, DHT, BitTorrent and HTTP bind to. tensor_iroh cannot be bound."""
    insecure_listen: bool = False
    """Allows `listen` beyond loopback although nothing authenticates a peer yet."""
    advertise: str | None = None
    """Host that other nodes reach this one at; `listen` unless given."""
    rpc_port: PortOrFree = 7400
    dht_port: PortOrFree = 7401
    bt_port: PortOrFree = 7402
    http_port: PortOrFree = 7480
    bootstrap: Annotated[tuple[Address, ...], NoDecode, BeforeValidator(_addresses)] = ()
    origins: Texts = ()
    """URLs of where shards come from when no peer has them, the one to ask first in front."""
    manifests: Texts = ()
    """URLs of manifests that this node holds from its start on."""
    o3_endpoint: str | None = None
    """Of Akave's S3 gateway; the community's unless given."""
    o3_region: str | None = None
    o3_backend: Annotated[str, Field(pattern=r"^(auto|gateway|native)$")] = "auto"
    """How o3:// is reached: the S3 gateway, or the SDK where it is installed and has a key."""
    s3_endpoint: str | None = None
    """Of s3:// origins; Amazon's unless given."""
    akave_node: str | None = None
    """HOST:PORT of an Akave node, for the SDK."""
    akave_ipc: str | None = None
    """HOST:PORT of its IPC endpoint."""
    origin_key_file: Annotated[Path, AfterValidator(Path.expanduser)] | None = None
    """Holds the key that objects are encrypted with at the origins."""
    publish_from: Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_texts)] = ()
    """Folders that PUBLISH may take files from, and no others; without one, on loopback, any but hidden ones."""
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(default_factory=usable_cores)
    """Of an engine process."""
    gpu_layers: Annotated[int, Field(ge=0, le=100_000)] = 0
    ctx_size: Annotated[int, Field(ge=64, le=1 << 24)] = 2048
    """Tokens of prompt and answer that one session may have."""
    max_sessions: Annotated[int, Field(ge=1, le=256)] = 4
    """Sessions at once of one engine process; each sets its share of KV cache aside."""
    share_cores: bool = True
    """Whether other processes compute on this machine's cores; without them, spinning threads are faster."""
    upload_limit: ByteSize = ByteSize(0)
    """Bytes/s of BitTorrent in total."""
    download_limit: ByteSize = ByteSize(0)
    min_free_disk: ByteSize = ByteSize(1 << 30)
    """Bytes that a download leaves free on the disk of `shards_dir`."""
    log_level: Annotated[str, Field(pattern=r"^(debug|info|warning|error)$")] = "info"

    @model_validator(mode="before")
    @classmethod
    def _default_shards_dir(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not values.get("shards_dir"):
            data_dir = values.get("data_dir") or cls.model_fields["data_dir"].get_default(call_default_factory=True)
            values = values | {"shards_dir": Path(data_dir) / "shards"}
        return values

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if ":" in self.listen:
            raise ValueError(f"listen {self.listen} is an IPv6 address; the DHT and tensor_iroh run on IPv4 alone")
        if not is_loopback(self.listen) and not self.insecure_listen:
            raise ValueError(
                f"listen {self.listen} is reachable from other machines, and nothing authenticates them yet; "
                "add --insecure-listen if this network is yours alone"
            )
        fixed = [port for port in (self.rpc_port, self.bt_port, self.http_port) if port]
        if len(set(fixed)) != len(fixed):
            raise ValueError("rpc_port, bt_port and http_port must differ")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        given = init_settings().get("config") or env_settings().get("config")
        path = _config_file(given)
        try:
            file = TomlConfigSettingsSource(settings_cls, toml_file=path)
        except (OSError, ValueError) as err:
            raise ConfigError(f"cannot read the configuration file {path}: {err}") from None
        return init_settings, env_settings, file


def load_settings(**flags: Any) -> Settings:
    """Settings from the flags that were given (None: not given) and the sources below them.

    Raises ConfigError.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as err:
        raise ConfigError("; ".join(_complaints(err))) from None
    except SettingsError as err:
        raise ConfigError(f"cannot read the configuration: {err}") from None


def unknown_variables() -> list[str]:
    """`SHOAL_*` variables of the environment that are no setting: most likely misspelt."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)


def _complaints(err: ValidationError) -> Iterator[str]:
    for one in err.errors():
        name = ".".join(map(str, one["loc"]))
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            yield f"{name}: there is no such setting"
        elif name:
            yield f"{name} = {str(one['input'])[:100]}: {message}"
        else:
            yield message


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _config_file(given: str | Path | None) -> Path | None:
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ConfigError(f"the configuration file {path} (--config, SHOAL_CONFIG) does not exist")
        return path
    path = Path(platformdirs.user_config_dir("shoal", appauthor=False)) / CONFIG_FILENAME
    return path if path.is_file() else None
