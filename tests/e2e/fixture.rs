//! What LiteFS does by itself. These tests need no litegate: they show that the cluster under test
//! is real, and why litegate is needed.

use crate::{
    cluster::{Cluster, PRIMARY},
    http::{self, Body},
    process::eventually,
};
use std::time::Duration;

#[test]
fn a_write_on_a_replica_is_an_empty_200_that_names_the_primary() {
    let cluster = Cluster::start();
    for replica in [1, 2] {
        for method in ["POST", "PUT", "PATCH", "DELETE", "MKCOL"] {
            let id = format!("{method}-{replica}");
            let answer = http::send(
                cluster.proxy(replica),
                method,
                &format!("/w/{id}"),
                Body { bytes: 1024 },
            )
            .expect("ask LiteFS's proxy");
            assert_eq!(answer.status, 200, "{method}");
            assert_eq!(answer.header("content-length"), Some("0"), "{method}");
            assert_eq!(answer.header("fly-replay"), Some("instance=abaci-app-0"), "{method}");
            assert!(cluster.rows(&id).is_empty(), "{method}: nothing was written");
        }
    }
}

#[test]
fn a_write_on_the_primary_reaches_every_node() {
    let cluster = Cluster::start();
    let body = Body { bytes: 300 * 1024 };
    let answer =
        http::send(cluster.proxy(PRIMARY), "POST", "/w/one", body).expect("ask LiteFS's proxy");
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(answer.json().expect("the row")["sum"], body.sum());
    assert!(answer.header("set-cookie").is_some_and(|cookie| cookie.starts_with("__txid=")));
    for node in 0..3 {
        eventually("the row is replicated", Duration::from_secs(5), || {
            let rows = http::get(cluster.proxy(node), "/w/one").map_err(|e| e.to_string())?;
            match rows.json()? {
                serde_json::Value::Array(rows) if rows.len() == 1 => Ok(()),
                other => Err(other.to_string()),
            }
        });
        let info = http::get(cluster.api(node), "/info").expect("ask LiteFS's API");
        assert_eq!(info.json().expect("/info")["isPrimary"], node == PRIMARY);
    }
}

#[test]
fn a_killed_node_comes_back_with_its_data() {
    let mut cluster = Cluster::start();
    http::send(cluster.proxy(PRIMARY), "POST", "/w/kept", Body::EMPTY).expect("write");
    for node in [2, PRIMARY] {
        cluster.kill(node);
        assert!(http::get(cluster.proxy(node), "/whoami").is_err(), "it is gone");
        cluster.spawn(node);
        cluster.wait_for(node);
    }
    assert_eq!(cluster.rows("kept").len(), 1);
}
