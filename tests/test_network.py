import os
import ssl
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import huggingface_hub
import pytest
from conftest import REPOSITORY
from local_server import Server

import gpt_download
import train_bert_hf
import train_gpt
from finetuning import network
from finetuning.download import Download, download
from finetuning.errors import UserError
from finetuning.network import wrong_setting

FAILED = OSError("the request failed")
VARIABLES = {name for settings in network.SETTINGS.values() for names, _ in settings for name in names}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """An environment that says nothing of the network."""
    for name in (*VARIABLES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("client", "name", "value", "problem"), [
    ("requests", "REQUESTS_CA_BUNDLE", "nowhere/ca.pem", "names nowhere/ca.pem, which is no file of certificates: No"),
    ("requests", "CURL_CA_BUNDLE", __file__, "which is no file of certificates: [X509: NO_CERTIFICATE"),
    ("requests", "ALL_PROXY", "socks5h://name:secret@host:1080", "names a SOCKS proxy, for which a package is missing"),
    ("requests", "http_proxy", "host:many", "is not the address of a proxy"),
    ("hub", "SSL_CERT_FILE", "nowhere/ca.pem", "names nowhere/ca.pem, which is no file of certificates"),
    ("hub", "SSL_CERT_DIR", "nowhere", "names nowhere, which is no folder"),
    ("hub", "HF_ENDPOINT", "hub.example", "is 'hub.example', which does not begin with http:// or https://"),
    ("hub", "HF_ENDPOINT", "", "is '', which does not begin"),
    ("hub", "https_proxy", "socks5://host:1080", "pip install socksio"),
    ("hub", "HTTPS_PROXY", "socks4://host:1080", "is not the address of a proxy"),
    ("hub", "HF_TOKEN", "hf_sec\nret", "holds characters that no token has"),
    ("hub", "HF_TOKEN", "hf_s\u00e9cret", "holds characters that no token has"),
    ("hub", "HUGGING_FACE_HUB_TOKEN", "hf_sec ret", "holds characters that no token has"),
])
def test_a_wrong_setting_is_named_and_no_secret_shown(client, name, value, problem, monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda package: None)
    monkeypatch.setenv(name, value)
    found = wrong_setting(FAILED, client)
    assert found.startswith(f"{name} ")
    assert problem in found
    assert "secret" not in found
    assert "\n" not in found
    if not name.lower().endswith("proxy"):
        assert wrong_setting(FAILED, {"hub": "requests", "requests": "hub"}[client]) is None  # which does not read it


@pytest.mark.parametrize(("name", "value"), [
    ("REQUESTS_CA_BUNDLE", os.fspath(REPOSITORY)), ("CURL_CA_BUNDLE", ""), ("SSL_CERT_FILE", ""),
    ("SSL_CERT_DIR", os.fspath(REPOSITORY)), ("HF_ENDPOINT", "http://127.0.0.1:8080/"), ("HTTPS_PROXY", "host:3128"),
    ("http_proxy", "http://name:p%40ss@[::1]:3128"), ("ALL_PROXY", "socks5://host"), ("HF_TOKEN", " hf_abc\n")])
@pytest.mark.parametrize("client", ["requests", "hub"])
def test_a_right_setting_is_not_blamed(client, name, value, monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda package: package in ("socks", "socksio"))
    monkeypatch.setenv(name, value)
    assert wrong_setting(FAILED, client) is None


def test_of_two_variables_the_one_that_is_read_counts(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", os.fspath(REPOSITORY))
    monkeypatch.setenv("CURL_CA_BUNDLE", "nowhere")
    assert wrong_setting(FAILED, "requests") is None


def test_offline_nothing_is_blamed(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "nowhere")
    error = OSError("cannot connect")
    error.__cause__ = huggingface_hub.errors.OfflineModeIsEnabled("offline")
    assert wrong_setting(error, "hub") is None


def test_a_token_that_is_refused_is_named(monkeypatch):
    error = OSError("401 Client Error. Invalid credentials in Authorization header")
    assert wrong_setting(error, "hub") is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert wrong_setting(error, "hub") == "HF_TOKEN holds a token that the Hugging Face Hub does not accept"
    assert wrong_setting(error, "requests") is None


class WantsPassword(BaseHTTPRequestHandler):
    """A proxy that lets nobody through."""

    def do_CONNECT(self):
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD = do_CONNECT

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    """The Hub's client as it is outside the tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def fetch_archive(folder):
    download(Download("https://reviews.invalid/a.tar.gz"), folder / "a.tar.gz")


def fetch_tokenizer(folder):
    train_gpt.load_encoding()


def fetch_gpt(folder):
    gpt_download.download_and_load_gpt2("124M")


def fetch_encoder(folder):
    train_bert_hf.load_model("someone/model", seed=1)


@pytest.mark.parametrize(("fetch", "name", "value"), [
    (fetch_archive, "REQUESTS_CA_BUNDLE", "nowhere"), (fetch_archive, "ALL_PROXY", "socks5://127.0.0.1:1"),
    (fetch_tokenizer, "CURL_CA_BUNDLE", "nowhere"), (fetch_tokenizer, "https_proxy", "socks5://127.0.0.1:1"),
    (fetch_gpt, "SSL_CERT_FILE", "nowhere"), (fetch_gpt, "https_proxy", "socks5://127.0.0.1:1"),
    (fetch_gpt, "HF_TOKEN", "hf_\u65e5\u672c"), (fetch_encoder, "SSL_CERT_FILE", "nowhere"),
    (fetch_encoder, "ALL_PROXY", "socks5://127.0.0.1:1"), (fetch_encoder, "HF_TOKEN", "hf_\u65e5\u672c"),
    (fetch_archive, "HTTPS_PROXY", None), (fetch_tokenizer, "HTTPS_PROXY", None), (fetch_gpt, "HTTPS_PROXY", None),
    (fetch_encoder, "HTTPS_PROXY", None)])
def test_whatever_downloads_names_the_variable(fetch, name, value, online, tmp_path, monkeypatch, capsys):
    """None stands for a proxy that wants a password."""
    if value and value.startswith("socks"):
        monkeypatch.setattr(network, "find_spec", lambda package: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Server(WantsPassword) as proxy:
        monkeypatch.setenv(name, value or proxy.url)
        with pytest.raises(UserError, match=name if value else f"the proxy of {name} wants a name and a password"
                           ) as raised:
            fetch(tmp_path)
    assert "a local directory with the same name" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert "trying again" not in capsys.readouterr().err


def test_the_address_of_the_hub(tmp_path):
    """It is read when the client is imported."""
    done = subprocess.run([sys.executable, "-c", "import gpt_download; gpt_download.download_and_load_gpt2('124M')"],
                          cwd=REPOSITORY, env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "hub.example"},
                          capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        "the cache has no copy: HF_ENDPOINT is 'hub.example', which does not begin with http:// or https://")


def test_a_folder_that_cannot_be_loaded_is_not_blamed_on_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "nowhere")
    with pytest.raises(UserError) as raised:
        train_bert_hf.load_model(str(tmp_path), seed=1)
    assert "SSL_CERT_FILE" not in str(raised.value)


def test_the_systems_certificates_are_right():
    path = ssl.get_default_verify_paths().cafile
    if not path:
        pytest.skip("the system has none in one file")
    assert network.check_certificates(path) is None
