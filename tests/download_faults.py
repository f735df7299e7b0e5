"""Faults of a server in a download, as functions of an Exchange; their docstrings name them in test ids."""

from local_server import send_correctly


def truncates(exchange):
    """closes the connection half way"""
    exchange.send_headers()
    exchange.send_half()


def resets(exchange):
    """resets the connection half way"""
    truncates(exchange)
    exchange.reset()


def resets_before_response(exchange):
    """resets the connection before the response"""
    exchange.reset()


def stalls(exchange):
    """stalls half way"""
    truncates(exchange)
    exchange.stall()


def stalls_before_response(exchange):
    """stalls before the response"""
    exchange.stall()


def declares_less(exchange):
    """declares half the length and sends half"""
    exchange.send_headers(length=(len(exchange.remaining) + 1) // 2)
    exchange.send_half()


def declares_more(exchange):
    """declares a greater length than it sends"""
    exchange.send_headers(length=len(exchange.remaining) + 100)
    exchange.send(exchange.remaining)


def sends_more(exchange):
    """sends more than the file"""
    exchange.send_headers(length=len(exchange.remaining) + 70_000)
    exchange.send(exchange.remaining + bytes(70_000))


def sends_wrong_bytes(exchange):
    """changes one bit"""
    exchange.send_headers()
    exchange.send(exchange.remaining[:-1] + bytes([exchange.remaining[-1] ^ 1]))


def sends_html(exchange):
    """sends an HTML page with status 200"""
    exchange.send_headers(length=19, status=200)
    exchange.send(b"<html>Log in</html>")


def omits_length(exchange):
    """omits the length and closes the connection half way"""
    exchange.send_headers(length="unknown")
    exchange.send_half()


def cuts_chunk(exchange):
    """closes the connection within a chunk of a chunked response"""
    exchange.send_headers(length="unknown", Transfer_Encoding="chunked")
    exchange.send(b"%x\r\n" % len(exchange.remaining))
    exchange.send_half()


def responds_503(exchange):
    """responds with 503"""
    exchange.send_headers(status=503, length=0)


def responds_500(exchange):
    """responds with 500"""
    exchange.send_headers(status=500, length=0)


def responds_429(exchange):
    """responds with 429"""
    exchange.send_headers(status=429, length=0)


def ignores_ranges(exchange):
    """sends the whole file in response to a Range request"""
    exchange.start = 0
    send_correctly(exchange)


def refuses_ranges(exchange):
    """responds with 416 to a Range request"""
    exchange.send_headers(status=416 if exchange.start else 200, length=0 if exchange.start else None)
    exchange.send(b"" if exchange.start else exchange.content)


def sends_other_range(exchange):
    """sends other bytes than Content-Range declares"""
    exchange.send_headers()
    exchange.send(exchange.content[: len(exchange.remaining)])


FAULTS = [
    truncates,
    resets,
    resets_before_response,
    stalls,
    stalls_before_response,
    declares_less,
    declares_more,
    sends_more,
    sends_wrong_bytes,
    sends_html,
    omits_length,
    cuts_chunk,
    responds_503,
    responds_500,
    responds_429,
]
RANGE_FAULTS = [ignores_ranges, refuses_ranges, sends_other_range]
