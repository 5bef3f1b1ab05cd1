"""Settings of a node: each is declared once, with its default, unit, help and flag.

Precedence, highest first: flag, environment variable (SHOAL_ and the setting's name), TOML file, default. The command
line (node/cli/options.py) is made from the declarations here, and hands over only the flags that were typed;
pydantic-settings finds the rest. A Settings that exists is valid: contradictions are refused at construction.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass
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
"""The node's identity, in `data_dir`."""
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


@dataclass(frozen=True)
class Flag:
    """How a setting is typed on the command line."""

    names: str
    """`--rpc-port`, or `--share-cores/--own-cores`."""
    metavar: str | None
    help: str
    """What it is, with its unit and default."""


def _setting(
    default: Any,
    text: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    default_text: str = "",
    **constraints: Any,
) -> Any:
    """Declare one setting: a callable default is called; `flag` if it is not the setting's name.

    `default_text` stands in the help for a default that is found out, or that another setting gives.
    """
    fallback = {"default_factory": default} if callable(default) else {"default": default}
    extra: dict[str, Any] = {"flag": flag, "metavar": metavar, "default_text": default_text}
    return Field(**fallback, description=text, json_schema_extra=extra, **constraints)


class Settings(BaseSettings):
    """All settings of `serve`. Ports of 0 mean a free one; limits of 0 mean none."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    config: Path | None = _setting(
        None,
        "TOML file of these settings; see below.",
        metavar="FILE",
        default_text="~/.config/shoal/config.toml, if there is one",
    )
    data_dir: Folder = _setting(
        lambda: Path(platformdirs.user_data_dir("shoal", appauthor=False)),
        "Key, hash cache, resume data and lock of the node.",
        metavar="DIR",
        default_text="the user's data folder",
    )
    shards_dir: Folder = _setting(
        Path(), "Shards to seed; fetched ones are stored here too.", metavar="DIR", default_text="DATA_DIR/shards"
    )
    cluster: str = _setting(
        "default",
        "Nodes of other clusters are not seen.",
        metavar="NAME",
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9._-]+$",
    )
    assign: Annotated[tuple[Assignment, ...], NoDecode, BeforeValidator(_assignments)] = _setting(
        (), "Shards to load at start; repeatable.", metavar="MODEL:ID[,ID...]"
    )
    listen: str = _setting("127.0.0.1", "Address of RPC, DHT, BitTorrent and HTTP.", metavar="ADDRESS")
    insecure_listen: bool = _setting(False, "Allow --listen beyond loopback, without authentication.")
    advertise: str | None = _setting(
        None, "Host that other nodes reach this one at.", metavar="HOST", default_text="what --listen says"
    )
    rpc_port: PortOrFree = _setting(7400, "TCP port of RPC; 0 picks a free one.", metavar="PORT")
    dht_port: PortOrFree = _setting(7401, "UDP port of the DHT; 0 picks a free one.", metavar="PORT")
    bt_port: PortOrFree = _setting(7402, "TCP port of BitTorrent; 0 picks a free one.", metavar="PORT")
    http_port: PortOrFree = _setting(7480, "TCP port of /healthz and /metrics; 0 picks a free one.", metavar="PORT")
    bootstrap: Annotated[tuple[Address, ...], NoDecode, BeforeValidator(_addresses)] = _setting(
        (), "A node of the DHT to join at; repeatable.", metavar="HOST:DHT_PORT"
    )
    origins: Texts = _setting(
        (),
        "Where shards come from if no peer has them, first to ask in front; repeatable.",
        flag="--origin",
        metavar="URL",
    )
    manifests: Texts = _setting(
        (), "Of a model or data set known from the start; repeatable.", flag="--manifest", metavar="URL"
    )
    o3_endpoint: str | None = _setting(
        None, "Akave's S3 gateway.", metavar="URL", default_text="the community's gateway"
    )
    o3_region: str | None = _setting(None, "Region of the gateway.", metavar="NAME", default_text="akave-network")
    o3_backend: str = _setting(
        "auto",
        "How o3:// is reached: by the S3 gateway, natively by the akavesdk, or by what has credentials.",
        metavar="auto|gateway|native",
        pattern=r"^(auto|gateway|native)$",
    )
    s3_endpoint: str | None = _setting(None, "Server of s3:// origins.", metavar="URL", default_text="Amazon's")
    akave_node: str | None = _setting(None, "Akave node for the akavesdk.", metavar="HOST:PORT")
    akave_ipc: str | None = _setting(
        None, "IPC endpoint for the akavesdk.", metavar="HOST:PORT", default_text="the node's"
    )
    origin_key_file: Folder | None = _setting(
        None, "Holds the key that objects are encrypted with at origins.", metavar="FILE"
    )
    publish_from: Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_texts)] = _setting(
        (), "PUBLISH takes files only from this folder; repeatable.", metavar="DIR"
    )
    threads: int = _setting(
        usable_cores,
        "Threads of an engine process.",
        metavar="N",
        default_text="the cores that it may use",
        ge=1,
        le=1024,
    )
    gpu_layers: int = _setting(0, "Layers on a GPU, if the engine has one.", metavar="N", ge=0, le=100_000)
    ctx_size: int = _setting(2048, "Tokens of prompt and answer in one session.", metavar="TOKENS", ge=64, le=1 << 24)
    max_sessions: int = _setting(
        4, "Sessions of one engine process at once; each reserves its KV cache.", metavar="N", ge=1, le=256
    )
    share_cores: bool = _setting(
        True,
        "Whether other processes compute on these cores; if not, threads spin and are faster.",
        flag="--share-cores/--own-cores",
        default_text="they do",
    )
    upload_limit: ByteSize = _setting(
        ByteSize(0), "Of BitTorrent in total; 0: no limit. 8MB, 512KiB.", metavar="BYTES/S"
    )
    download_limit: ByteSize = _setting(
        ByteSize(0), "Of BitTorrent in total; 0: no limit. 8MB, 512KiB.", metavar="BYTES/S"
    )
    min_free_disk: ByteSize = _setting(
        ByteSize(1 << 30), "Space that downloads leave free on the disk of SHARDS_DIR.", metavar="BYTES"
    )
    log_level: str = _setting(
        "info",
        "The least severe level that is logged.",
        metavar="debug|info|warning|error",
        pattern=r"^(debug|info|warning|error)$",
    )

    @classmethod
    def flag(cls, name: str) -> Flag:
        """How a setting is typed, by its name."""
        field = cls.model_fields[name]
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        default = str(extra["default_text"]) or _shown(field.default)
        return Flag(
            names=str(extra["flag"] or f"--{name.replace('_', '-')}"),
            metavar=str(extra["metavar"]) if extra["metavar"] else None,
            help=f"{field.description} Default: {default}." if default else str(field.description),
        )

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


def _shown(default: object) -> str:
    """A default for a person; nothing for an empty one."""
    if isinstance(default, ByteSize):
        return default.human_readable(separator="").replace(".0", "") if default else "0"
    if isinstance(default, bool):  # an option that is there or not
        return ""
    return str(default) if isinstance(default, int | str) else ""


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
    """`SHOAL_*` variables of the environment that name no setting: most likely misspelt."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)


def _complaints(err: ValidationError) -> Iterator[str]:
    for one in err.errors():
        name = ".".join(map(str, one["loc"]))
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, Settings.model_fields, 1)
            yield f"{name}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
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
