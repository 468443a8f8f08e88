"""Which proxy of the environment (https_proxy, http_proxy, no_proxy) the requests to a hosted server go through.

Servers of one's own cluster are reached directly, whatever the environment says: engines, SGLang's native API, and all
hosts without a domain or with an address that is not public. The environment is read once, by the same rules as by
urllib; ~/.netrc is not.
"""

from __future__ import annotations

import base64
import ipaddress
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Proxy:
    """url None: no proxy."""

    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


DIRECT = Proxy()


def proxy_for(url: str) -> Proxy:
    """The proxy that the environment names for a hosted server's `url`. Raises ValueError for one of another kind."""
    target = urllib.parse.urlsplit(url)
    host = target.hostname or ""
    if not is_public(host) or urllib.request.proxy_bypass(target.netloc) or urllib.request.proxy_bypass(host):
        return DIRECT
    if not (value := urllib.request.getproxies().get(target.scheme)):
        return DIRECT
    parts = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{target.scheme}_proxy: only http://HOST:PORT proxies can be used, not {parts.scheme}://")
    user, separator, address = parts.netloc.rpartition("@")
    login = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    headers = {"Proxy-Authorization": f"Basic {login}"} if separator else {}
    return Proxy(f"{parts.scheme}://{address}", headers)


def is_public(host: str) -> bool:
    """Whether a host may lie outside of the cluster: a name with a domain, or a public address."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host.rstrip(".") and not host.rstrip(".").endswith((".localhost", ".local", ".internal"))
