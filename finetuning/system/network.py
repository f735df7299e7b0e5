"""Diagnosis of failed requests: which environment variable of the network is to blame.

Requests downloads the reviews and GPT-2's tokenizer, the Hugging Face Hub's client everything else. They
read different variables, and their errors name none of them.
"""

import os
import re
import ssl
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from urllib.parse import urlsplit

PROXIES = [(f"{scheme}_proxy", f"{scheme.upper()}_PROXY") for scheme in ("https", "http", "all")]
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HTTP_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "hf_xet", "requests"}
HTTP, SOCKS = ("http", "https"), ("socks5", "socks5h")
SOCKS_PACKAGES = {"socks": "PySocks", "socksio": "socksio"}  # module -> name on PyPI


def misconfigured_variable(error: BaseException | None, client: str) -> str | None:
    """Return the environment variable that made a request of `client`, "requests" or "hub", fail, and its problem.

    Returns None if there is none. Values that may contain a secret are not shown.
    """
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes(error)):
        return None
    for names, check in CHECKS[client]:
        if (name := first_set(names)) and (problem := check(os.environ[name])):
            return f"{name} {problem}"
    messages = " ".join(map(str, causes(error)))
    proxies = [name for name in map(first_set, PROXIES) if name]
    if proxies and re.search(r"\b407\b", messages):
        return (
            f"the proxy of {' or '.join(proxies)} requires a valid user name and password: "
            "http://NAME:PASSWORD@HOST:PORT"
        )
    if client == "hub" and (token := first_set(TOKENS)) and re.search(r"\b401\b", messages):
        return f"{token} holds a token that the Hugging Face Hub does not accept"
    return None


def is_network_error(error: BaseException) -> bool:
    """Return whether an error comes from the HTTP or transfer packages of the Hub's client."""
    return type(error).__module__.partition(".")[0] in HTTP_PACKAGES


def first_set(names: tuple[str, ...]) -> str | None:
    """Return the first variable that is set and not empty; HF_ENDPOINT may be empty."""
    return next(
        (name for name in names if os.environ.get(name) or (name == "HF_ENDPOINT" and name in os.environ)), None
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its chain of causes."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def check_certificates(path: str) -> str | None:
    """Return the problem with a file or folder of certificates, or None."""
    if os.path.isdir(path):
        return None
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is a subclass
        return f"names {path}, which is not a file of certificates: {error.strerror or error}"
    return None


def check_folders(paths: str) -> str | None:
    """Return the problem with folders separated as in PATH, or None; OpenSSL skips missing ones, so one suffices."""
    return None if any(map(os.path.isdir, paths.split(os.pathsep))) else f"names {paths}, which is not a folder"


def check_endpoint(url: str) -> str | None:
    """Return the problem with the URL of a Hub, or None."""
    return None if re.match(r"https?://[^/]", url) else f"is {url!r}, which does not begin with http:// or https://"


def check_token(token: str) -> str | None:
    """Return the problem with a token, or None; the Hub's client strips surrounding white space."""
    return None if re.fullmatch(r"[!-~]+", token.strip()) else "contains characters that no token has"


def check_proxy(url: str, schemes: tuple[str, ...], socks_module: str) -> str | None:
    """Return the problem with the URL of a proxy, or None; SOCKS proxies need `socks_module`."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_valid = parts.hostname and parts.scheme in schemes and parts.port != 0
    except ValueError:  # malformed port
        is_valid = False
    if not is_valid:
        return "is not the address of a proxy, such as http://HOST:PORT"
    if parts.scheme.startswith("socks") and not find_spec(socks_module):
        return f"names a SOCKS proxy, which needs a package: pip install {SOCKS_PACKAGES[socks_module]}"
    return None


def proxy_checks(schemes: tuple[str, ...], socks_module: str) -> list[tuple]:
    """Return the entries of CHECKS for proxies."""
    return [(names, partial(check_proxy, schemes=schemes, socks_module=socks_module)) for names in PROXIES]


# For each client: (variables of which the first that is set is used, check of its value).
CHECKS = {
    "requests": [
        (("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), check_certificates),
        *proxy_checks((*HTTP, *SOCKS, "socks4", "socks4a"), "socks"),
    ],
    "hub": [
        (("SSL_CERT_FILE",), check_certificates),
        (("SSL_CERT_DIR",), check_folders),
        (("HF_ENDPOINT",), check_endpoint),
        (TOKENS, check_token),
        *proxy_checks((*HTTP, *SOCKS), "socksio"),
    ],
}
