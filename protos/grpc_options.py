"""gRPC settings that every channel and server inside the deployment shares.

All three keepalive settings are needed: with pings alone a stopped (SIGSTOP) peer is noticed after 60 s, with
`ping_timeout_ms` too after 3-4 s. The server must permit the pings, or it answers GOAWAY too_many_pings.
"""

MAX_INTERNAL_MESSAGE_BYTES = 64 << 20

_SIZES = [
    ("grpc.max_receive_message_length", MAX_INTERNAL_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_INTERNAL_MESSAGE_BYTES),
]

CHANNEL_OPTIONS = [
    *_SIZES,
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that comes back is reached at once, not after the default backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Channels to one address share connections otherwise, and with them head-of-line blocking and death.
    ("grpc.use_local_subchannel_pool", 1),
]

SERVER_OPTIONS = [
    *_SIZES,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two workers must never share a port by accident.
    ("grpc.so_reuseport", 0),
    # KV comes in messages of a megabyte: in one HTTP/2 frame each, and the next while one is being placed.
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 2 << 20),
]
