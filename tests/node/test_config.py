"""Settings: the order of sources, and what is refused where it is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.config import Address, Assignment, ConfigError, is_loopback, load_settings, unknown_variables
from node.node import swarm_settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_defaults_bind_to_loopback_and_keep_shards_below_the_data_dir(tmp_path: Path) -> None:
    settings = load_settings()
    assert is_loopback(settings.listen)
    assert settings.data_dir == tmp_path / "data" / "shoal"
    assert settings.shards_dir == tmp_path / "data" / "shoal" / "shards"
    assert (settings.rpc_port, settings.dht_port, settings.bt_port, settings.http_port) == (7400, 7401, 7402, 7480)


def test_shards_dir_follows_a_data_dir_from_any_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings(data_dir=tmp_path / "a").shards_dir == tmp_path / "a" / "shards"
    monkeypatch.setenv("SHOAL_DATA_DIR", str(tmp_path / "b"))
    assert load_settings().shards_dir == tmp_path / "b" / "shards"
    monkeypatch.setenv("SHOAL_SHARDS_DIR", str(tmp_path / "c"))
    assert load_settings().shards_dir == tmp_path / "c"


def test_flags_over_environment_over_file_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "shoal.toml"
    file.write_text('cluster = "file"\nrpc_port = 1001\ndht_port = 1002\nbootstrap = ["h:1"]\nassign = ["m:0"]\n')
    monkeypatch.setenv("SHOAL_CONFIG", str(file))
    monkeypatch.setenv("SHOAL_RPC_PORT", "2001")
    monkeypatch.setenv("SHOAL_CLUSTER", "environment")
    settings = load_settings(cluster="flag")
    assert settings.cluster == "flag"
    assert settings.rpc_port == 2001
    assert settings.dht_port == 1002
    assert settings.bt_port == 7402
    assert settings.bootstrap == (Address("h", 1),)
    assert settings.assign == (Assignment("m", (0,)),)


def test_the_users_own_config_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "shoal"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('cluster = "mine"\n')
    assert load_settings().cluster == "mine"


def test_lists_and_sizes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_BOOTSTRAP", "a:1,[::1]:2")
    monkeypatch.setenv("SHOAL_ASSIGN", "org/model:0,2 other:1")
    monkeypatch.setenv("SHOAL_UPLOAD_LIMIT", "8MB")
    monkeypatch.setenv("SHOAL_ORIGINS", "o3://bucket/a s3://bucket")
    settings = load_settings(manifests=["o3://bucket/a/manifests/smol/"])
    assert settings.origins == ("o3://bucket/a", "s3://bucket")
    assert settings.manifests == ("o3://bucket/a/manifests/smol/",)
    assert settings.bootstrap == (Address("a", 1), Address("::1", 2))
    assert settings.assign == (Assignment("org/model", (0, 2)), Assignment("other", (1,)))
    assert settings.upload_limit == 8_000_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"listen": "0.0.0.0"}, "--insecure-listen"),
        ({"listen": "::1"}, "IPv4"),
        ({"rpc_port": 65536}, "rpc_port"),
        ({"cluster": "two words"}, "cluster"),
        ({"bootstrap": ["nowhere"]}, "HOST:PORT"),
        ({"bootstrap": ["h:0"]}, "HOST:PORT"),
        ({"assign": ["model"]}, "MODEL:ID"),
        ({"assign": ["model:-1"]}, "MODEL:ID"),
        ({"upload_limit": "fast"}, "upload_limit = fast"),
        ({"rpc_port": 5, "http_port": 5}, "must differ"),
        ({"threads": 0}, "threads"),
        ({"origins": 5}, "origins = 5"),
        ({"o3_backend": "both"}, "o3_backend = both"),
    ],
)
def test_what_contradicts_is_refused_by_name(flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(**flags)


def test_a_misspelt_setting_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "shoal.toml"
    file.write_text("rcp_port = 1001\n")
    monkeypatch.setenv("SHOAL_CONFIG", str(file))
    with pytest.raises(ConfigError, match="rcp_port: there is no such setting"):
        load_settings()


@pytest.mark.parametrize("content", [None, "rpc_port = \n"])
def test_a_missing_or_broken_file_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "shoal.toml"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SHOAL_CONFIG", str(file))
    with pytest.raises(ConfigError, match=r"configuration file .*shoal\.toml"):
        load_settings()


def test_a_given_file_stands_over_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("typed", "exported"):
        (tmp_path / f"{name}.toml").write_text(f'cluster = "{name}"\n')
    monkeypatch.setenv("SHOAL_CONFIG", str(tmp_path / "exported.toml"))
    assert load_settings().cluster == "exported"
    assert load_settings(config=tmp_path / "typed.toml").cluster == "typed"


def test_a_tilde_is_the_home_folder_whatever_it_came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_SHARDS_DIR", "~/shards")
    settings = load_settings(data_dir=Path("~/data"))
    assert (settings.data_dir, settings.shards_dir) == (tmp_path / "data", tmp_path / "shards")
    monkeypatch.delenv("SHOAL_SHARDS_DIR")
    assert load_settings(data_dir=Path("~/data")).shards_dir == tmp_path / "data" / "shards"


def test_variables_that_are_no_setting_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_RPC_PORT", "1")
    monkeypatch.setenv("SHOAL_RCP_PORT", "1")
    monkeypatch.setenv("SHOAL_CONFIG", "")
    assert unknown_variables() == ["SHOAL_RCP_PORT"]


def test_insecure_listen_allows_it() -> None:
    assert load_settings(listen="0.0.0.0", insecure_listen=True).listen == "0.0.0.0"


def test_on_all_addresses_bittorrent_has_one_port(tmp_path: Path) -> None:
    """libtorrent would take another free port for each address; others are told one."""
    everywhere = load_settings(data_dir=tmp_path, listen="0.0.0.0", insecure_listen=True, bt_port=0)
    assert swarm_settings(everywhere).port > 0
    assert swarm_settings(load_settings(data_dir=tmp_path, bt_port=0)).port == 0
    assert swarm_settings(load_settings(data_dir=tmp_path, bt_port=7402)).port == 7402
