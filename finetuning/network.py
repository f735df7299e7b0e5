"""Settings of the network in the environment: which of them a failed request is due to.

Requests downloads the reviews and GPT-2's tokenizer; everything else comes through the Hugging Face Hub's client.
The two read different variables, and neither names one when it fails.
"""

import os
import re
import ssl
from functools import partial
from importlib.util import find_spec
from urllib.parse import urlsplit

PROXIES = [(f"{scheme}_proxy", f"{scheme.upper()}_PROXY") for scheme in ("https", "http", "all")]
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def wrong_setting(error, client):
    """Return which variable of the environment made a request of `client`, "requests" or "hub", fail, and how.

    None if none did. Values of variables that may hold a secret are not shown.
    """
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes(error)):
        return None
    for names, check in SETTINGS[client]:
        if (name := first_set(names)) and (problem := check(os.environ[name])):
            return f"{name} {problem}"
    reasons = " ".join(map(str, causes(error)))
    proxies = [name for name in map(first_set, PROXIES) if name]
    if proxies and re.search(r"\b407\b", reasons):
        return (f"the proxy of {' or '.join(proxies)} wants a name and a password, or other ones: "
                "http://NAME:PASSWORD@HOST:PORT")
    if client == "hub" and (token := first_set(TOKENS)) and re.search(r"\b401\b", reasons):
        return f"{token} holds a token that the Hugging Face Hub does not accept"
    return None


def first_set(names):
    """Return the first of the variables that is set, else None; only an empty HF_ENDPOINT counts as set."""
    return next((name for name in names
                 if os.environ.get(name) or (name == "HF_ENDPOINT" and name in os.environ)), None)


def causes(error):
    """Yield an exception and those it arose from."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def check_certificates(path):
    """Say what is wrong with a file or folder of certificates."""
    if os.path.isdir(path):
        return None
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # an SSLError is one
        return f"names {path}, which is no file of certificates: {error.strerror or error}"
    return None


def check_endpoint(url):
    """Say what is wrong with the address of a Hub."""
    return None if re.match(r"https?://[^/]", url) else f"is {url!r}, which does not begin with http:// or https://"


def check_token(token):
    """Say what is wrong with a token; the Hub's client strips what stands around it."""
    return None if re.fullmatch(r"[!-~]+", token.strip()) else "holds characters that no token has"


def check_proxy(url, schemes, socks):
    """Say what is wrong with the address of a proxy; `socks` is the package that SOCKS proxies take."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        valid = parts.hostname and parts.scheme in schemes and parts.port != 0
    except ValueError:  # of a port that is no number
        valid = False
    if not valid:
        return "is not the address of a proxy, such as http://HOST:PORT"
    if parts.scheme.startswith("socks") and not find_spec(socks):
        return f"names a SOCKS proxy, for which a package is missing: pip install {PACKAGES[socks]}"
    return None


PACKAGES = {"socks": "PySocks", "socksio": "socksio"}
HTTP, SOCKS = ("http", "https"), ("socks5", "socks5h")
# For each client the variables it reads, the first that is set of each tuple, and what is known of their values.
SETTINGS = {
    "requests": [(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), check_certificates),
                 *((names, partial(check_proxy, schemes=(*HTTP, *SOCKS, "socks4", "socks4a"), socks="socks"))
                   for names in PROXIES)],
    "hub": [(("SSL_CERT_FILE",), check_certificates),
            (("SSL_CERT_DIR",), lambda path: None if os.path.isdir(path) else f"names {path}, which is no folder"),
            (("HF_ENDPOINT",), check_endpoint), (TOKENS, check_token),
            *((names, partial(check_proxy, schemes=(*HTTP, *SOCKS), socks="socksio")) for names in PROXIES)],
}
