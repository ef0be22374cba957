//! A JSON Schema of the configuration, for editors that complete and check while one types.
//!
//! The loader says more, and with the cure: this is the shape only.

use serde_json::{Value, json};

/// The schema, draft 2020-12.
pub fn schema() -> Value {
    let duration = json!({ "type": "string", "pattern": "^[0-9.]+(ms|s|m|h)$" });
    let size = json!({ "type": ["string", "integer"] });
    let count = json!({ "type": "integer", "minimum": 0 });
    let share = json!({ "type": "number", "minimum": 0, "maximum": 1 });
    let text = json!({ "type": "string" });
    let boolean = json!({ "type": "boolean" });
    let texts = json!({ "type": ["string", "array"], "items": { "type": "string" } });
    let words = |words: &[&str]| json!({ "enum": words });
    let table = |properties: Value| json!({ "type": "object", "additionalProperties": false, "properties": properties });

    let source = json!({
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": words(&["litefs", "consul", "instance", "dns", "http", "file"]),
            "port": count, "poll": duration, "name": text, "resolvers": texts,
            "address": text, "key": text, "token": text, "datacenter": text,
            "path": text, "interval": duration, "timeout": duration, "instance": text,
        },
    });
    let cluster = table(json!({
        "port": { "type": "integer", "minimum": 1, "maximum": 65535 },
        "members": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": words(&["dns", "srv", "static"]),
                "name": text,
                "resolvers": texts,
                "nodes": { "type": "array", "items": table(json!({ "name": text, "address": text, "api": text, "zone": text })) },
            },
        },
        "primary": { "anyOf": [source, { "type": "array", "items": source }] },
        "reads": words(&["prefer-replicas", "replicas", "all", "primary"]),
        "balance": words(&["peak-ewma", "least-request", "round-robin", "random"]),
        "prefer": words(&["any", "local"]),
        "max_lag": duration, "soft_lag": duration, "slow_start": duration,
        "tripwire": table(json!({ "transactions": count })),
        "max_writes": count, "max_writes_wait": duration,
        "max_requests": count, "max_pending": count, "max_idle": count,
        "send_proxy": words(&["off", "v1", "v2"]),
        "upstream": table(json!({
            "protocol": words(&["http/1.1", "h2", "auto"]),
            "tls": { "anyOf": [boolean, table(json!({
                "ca": texts, "server_name": text, "certificate": text, "key": text,
                "insecure_skip_verify": boolean,
            }))] },
        })),
        "timeouts": table(json!({
            "connect": duration, "response_header": duration, "idle": duration,
            "stream_idle": duration, "tunnel_idle": duration, "tunnel_close": duration,
            "pool_idle": duration,
        })),
        "health": table(json!({
            "path": text, "interval": duration, "timeout": duration, "eject_after": count,
            "eject_base": duration, "eject_longest": duration, "eject_max": share,
        })),
        "retry": table(json!({
            "on": texts, "attempts": count, "budget": share, "budget_min": count,
        })),
        "consistency": table(json!({
            "mode": words(&["token", "affinity", "off"]), "databases": texts, "wait": duration,
            "affinity": duration, "token_age": duration, "key": text, "cookie": boolean,
            "txid_cookie": boolean, "on_request": words(&["any", "trusted", "off"]),
        })),
        "durability": table(json!({
            "replicas": count, "timeout": duration, "on_timeout": words(&["warn", "fail"]),
        })),
        "replay": table(json!({
            "max_hops": count, "buffer": size, "json": boolean, "pass": boolean,
            "primary_region": text,
        })),
        "hold": table(json!({
            "timeout": duration, "max_requests": count, "max_bytes": size, "release": count,
        })),
    }));
    let mut root = table(json!({
        "server": table(json!({
            "zone": text,
            "workers": { "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1 }] },
            "drain": table(json!({ "delay": duration, "timeout": duration })),
        })),
        "listener": { "type": "array", "minItems": 1, "items": table(json!({
            "address": text,
            "protocols": { "type": "array", "items": words(&["http/1.1", "h2"]) },
            "tls": table(json!({
                "certificates": { "type": "array", "minItems": 1, "items": table(json!({
                    "certificate": text, "key": text,
                })) },
                "client_ca": text,
                "client_auth": words(&["off", "optional", "required"]),
                "acme": table(json!({
                    "directory": text, "ca": text, "contacts": texts, "domains": texts,
                    "cache": text, "terms_agreed": boolean,
                })),
            })),
            "http3": { "anyOf": [boolean, table(json!({
                "alt_svc": duration,
                "port": { "type": "integer", "minimum": 1, "maximum": 65535 },
            }))] },
            "proxy_protocol": words(&["off", "accept", "require"]),
            "proxy_protocol_from": texts,
            "trusted_proxies": texts,
            "connections": count,
        })) },
        "admin": table(json!({ "address": text, "peers": texts })),
        "access_log": table(json!({ "format": words(&["text", "json", "off"]), "output": text })),
        "limits": table(json!({
            "header_bytes": size, "headers": count, "uri_bytes": size, "header_read": duration,
            "idle": duration, "body_idle": duration, "body_rate": size, "connections": count,
            "replay_bytes": size,
            "streams": count, "resets": count, "frames": count, "requests_per_connection": count,
            "tls_handshake": duration, "tls_handshakes": count,
            "underscores": words(&["drop", "refuse", "allow"]),
            "ambiguous_paths": words(&["same-route", "refuse", "allow"]),
            "client": table(json!({
                "requests": count, "requests_burst": count, "connects": count,
                "connects_burst": count, "connections": count, "clients": count,
                "ipv6_prefix": { "type": "integer", "minimum": 1, "maximum": 128 },
                "exempt": texts,
            })),
        })),
        "cluster": { "type": "object", "minProperties": 1, "additionalProperties": cluster },
        "route": { "type": "array", "items": table(json!({
            "host": texts, "path": text, "path_exact": text, "path_glob": text, "method": texts,
            "header": { "type": "array", "items": table(json!({ "name": text, "value": text })) },
            "class": words(&["auto", "read", "write"]),
            "cluster": text, "idempotent": boolean, "retry_uncommitted": boolean, "allow_trace": boolean,
            "causal": { "anyOf": [words(&["path"]), { "type": "integer", "minimum": 0, "maximum": 32 }] },
        })) },
    }));
    root["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    root["title"] = json!("litegate.toml");
    root["required"] = json!(["listener", "cluster"]);
    root
}
