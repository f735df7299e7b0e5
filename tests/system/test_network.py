import os
import ssl
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import huggingface_hub
import pytest
from helpers import REPOSITORY
from local_server import Server

import gpt_download
import train_bert_hf
import train_gpt
from finetuning.hub_models import loading_problem
from finetuning.system import network
from finetuning.system.download import RemoteFile, download
from finetuning.system.errors import UserError
from finetuning.system.network import is_network_error, misconfigured_variable

FAILED = OSError("the request failed")
VARIABLES = {name for checks in network.CHECKS.values() for names, _ in checks for name in names}


@pytest.fixture(autouse=True)
def unset_variables(monkeypatch):
    """Unset all network variables."""
    for name in (*VARIABLES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("client", "name", "value", "problem"),
    [
        (
            "requests",
            "REQUESTS_CA_BUNDLE",
            "nowhere/ca.pem",
            "names nowhere/ca.pem, which is not a file of certificates: No",
        ),
        ("requests", "CURL_CA_BUNDLE", __file__, "which is not a file of certificates: [X509: NO_CERTIFICATE"),
        (
            "requests",
            "ALL_PROXY",
            "socks5h://name:secret@host:1080",
            "names a SOCKS proxy, which needs a package: pip install PySocks",
        ),
        ("requests", "http_proxy", "host:many", "is not the address of a proxy"),
        ("hub", "SSL_CERT_FILE", "nowhere/ca.pem", "names nowhere/ca.pem, which is not a file of certificates"),
        ("hub", "SSL_CERT_DIR", "nowhere", "names nowhere, which is not a folder"),
        ("hub", "HF_ENDPOINT", "hub.example", "is 'hub.example', which does not begin with http:// or https://"),
        ("hub", "HF_ENDPOINT", "", "is '', which does not begin"),
        ("hub", "https_proxy", "socks5://host:1080", "pip install socksio"),
        ("hub", "HTTPS_PROXY", "socks4://host:1080", "is not the address of a proxy"),
        ("hub", "HF_TOKEN", "hf_sec\nret", "contains characters that no token has"),
        ("hub", "HF_TOKEN", "hf_s\u00e9cret", "contains characters that no token has"),
        ("hub", "HUGGING_FACE_HUB_TOKEN", "hf_sec ret", "contains characters that no token has"),
    ],
)
def test_misconfigured_variable_names_variable_and_hides_secrets(client, name, value, problem, monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda package: None)
    monkeypatch.setenv(name, value)
    message = misconfigured_variable(FAILED, client)
    assert message.startswith(f"{name} ")
    assert problem in message
    assert "secret" not in message
    assert "\n" not in message
    if not name.lower().endswith("proxy"):  # the other client does not read it
        assert misconfigured_variable(FAILED, {"hub": "requests", "requests": "hub"}[client]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REQUESTS_CA_BUNDLE", os.fspath(REPOSITORY)),
        ("CURL_CA_BUNDLE", ""),
        ("SSL_CERT_FILE", ""),
        ("SSL_CERT_DIR", os.fspath(REPOSITORY)),
        ("SSL_CERT_DIR", os.pathsep.join(["nowhere", os.fspath(REPOSITORY)])),
        ("HF_ENDPOINT", "http://127.0.0.1:8080/"),
        ("HTTPS_PROXY", "host:3128"),
        ("http_proxy", "http://name:p%40ss@[::1]:3128"),
        ("ALL_PROXY", "socks5://host"),
        ("HF_TOKEN", " hf_abc\n"),
    ],
)
@pytest.mark.parametrize("client", ["requests", "hub"])
def test_misconfigured_variable_accepts_valid_values(client, name, value, monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda package: package in ("socks", "socksio"))
    monkeypatch.setenv(name, value)
    assert misconfigured_variable(FAILED, client) is None


def test_misconfigured_variable_ignores_variable_that_another_overrides(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", os.fspath(REPOSITORY))
    monkeypatch.setenv("CURL_CA_BUNDLE", "nowhere")
    assert misconfigured_variable(FAILED, "requests") is None


def test_misconfigured_variable_is_none_in_offline_mode(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "nowhere")
    error = OSError("cannot connect")
    error.__cause__ = huggingface_hub.errors.OfflineModeIsEnabled("offline")
    assert misconfigured_variable(error, "hub") is None


def test_misconfigured_variable_names_rejected_token(monkeypatch):
    error = OSError("401 Client Error. Invalid credentials in Authorization header")
    assert misconfigured_variable(error, "hub") is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert misconfigured_variable(error, "hub") == "HF_TOKEN holds a token that the Hugging Face Hub does not accept"
    assert misconfigured_variable(error, "requests") is None


class AuthenticatingProxy(BaseHTTPRequestHandler):
    """Proxy that rejects every request for want of a password."""

    def do_CONNECT(self):
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_CONNECT

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    """Let the Hub's client try to connect."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def fetch_archive(folder):
    download(RemoteFile("https://reviews.invalid/a.tar.gz"), folder / "a.tar.gz")


def fetch_tokenizer(folder):
    train_gpt.load_encoding()


def fetch_gpt(folder):
    gpt_download.download_and_load_gpt2("124M")


def fetch_encoder(folder):
    train_bert_hf.load_pretrained("someone/model", seed=1)


@pytest.mark.parametrize(
    ("fetch", "name", "value"),
    [
        (fetch_archive, "REQUESTS_CA_BUNDLE", "nowhere"),
        (fetch_archive, "ALL_PROXY", "socks5://127.0.0.1:1"),
        (fetch_tokenizer, "CURL_CA_BUNDLE", "nowhere"),
        (fetch_tokenizer, "https_proxy", "socks5://127.0.0.1:1"),
        (fetch_gpt, "SSL_CERT_FILE", "nowhere"),
        (fetch_gpt, "https_proxy", "socks5://127.0.0.1:1"),
        (fetch_gpt, "HF_TOKEN", "hf_\u65e5\u672c"),
        (fetch_encoder, "SSL_CERT_FILE", "nowhere"),
        (fetch_encoder, "ALL_PROXY", "socks5://127.0.0.1:1"),
        (fetch_encoder, "HF_TOKEN", "hf_\u65e5\u672c"),
        (fetch_archive, "HTTPS_PROXY", None),
        (fetch_tokenizer, "HTTPS_PROXY", None),
        (fetch_gpt, "HTTPS_PROXY", None),
        (fetch_encoder, "HTTPS_PROXY", None),
    ],
)
def test_downloads_report_misconfigured_variable(fetch, name, value, online, tmp_path, monkeypatch, capsys):
    """The value None is replaced by a proxy that requires a password."""
    if value and value.startswith("socks"):
        monkeypatch.setattr(network, "find_spec", lambda package: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Server(AuthenticatingProxy) as proxy:
        monkeypatch.setenv(name, value or proxy.url)
        with pytest.raises(
            UserError, match=name if value else f"the proxy of {name} requires a valid user name and password"
        ) as raised:
            fetch(tmp_path)
    assert "a local directory with the same name" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert "retrying" not in capsys.readouterr().err


def test_invalid_hub_endpoint_is_reported():
    """In a new process: the client reads HF_ENDPOINT when it is imported."""
    process = subprocess.run(
        [sys.executable, "-c", "import gpt_download; gpt_download.download_and_load_gpt2('124M')"],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "hub.example"},
        capture_output=True,
        text=True,
    )
    assert process.stderr.splitlines()[-1].endswith(
        "the cache has no copy: HF_ENDPOINT is 'hub.example', which does not begin with http:// or https://"
    )


def test_error_of_local_model_does_not_mention_network_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "nowhere")
    with pytest.raises(UserError) as raised:
        train_bert_hf.load_pretrained(str(tmp_path), seed=1)
    assert "SSL_CERT_FILE" not in str(raised.value)


def test_check_certificates_accepts_those_of_the_system():
    path = ssl.get_default_verify_paths().cafile
    if not path:
        pytest.skip("the system has no certificate file")
    assert network.check_certificates(path) is None


@pytest.mark.parametrize(("module", "expected"), [("httpx2", True), ("hf_xet", True), ("builtins", False)])
def test_errors_of_http_packages_are_network_errors(module, expected):
    error = type("ProxyError", (Exception,), {"__module__": module})("403 Forbidden")
    assert is_network_error(error) == expected
    assert bool(loading_problem(error, "someone/model", "someone/model", {})) == expected
