//! Finds a member by whatever a node or an operator calls it.

use std::net::{IpAddr, SocketAddr};

use super::{Node, Presence};

/// The node that goes by `name`: the stronger kind of likeness wins, and where two nodes are
/// alike by it, neither is meant. A node that drains is meant only where no member is: a pod that
/// moves to another address takes its name along.
pub(super) fn find<'n>(nodes: &'n [Node], name: &str) -> Option<&'n Node> {
    let bare = without_port(name);
    let ip = bare.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    let socket = name.parse::<SocketAddr>().ok();
    let label = bare.split('.').next().unwrap_or(bare);
    let kinds: [&dyn Fn(&Node) -> bool; 6] = [
        &|node| &*node.name == name,
        &|node| node.name.eq_ignore_ascii_case(name),
        &|node| node.name.eq_ignore_ascii_case(bare),
        &|node| socket == Some(node.address),
        &|node| ip == Some(node.address.ip()),
        // An address has dots too, but no labels.
        &|node| ip.is_none() && first_label(&node.name).eq_ignore_ascii_case(label),
    ];
    [Presence::Member, Presence::Draining].into_iter().find_map(|presence| {
        kinds.iter().find_map(|is_alike| {
            let listed = nodes.iter().filter(|node| node.presence == presence);
            let mut alike = listed.filter(|node| is_alike(node));
            alike.next().filter(|_| alike.next().is_none())
        })
    })
}

fn first_label(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

/// `a` of `a:1`; an IPv6 address without brackets has no port.
fn without_port(name: &str) -> &str {
    match name.rsplit_once(':') {
        Some((host, port))
            if port.bytes().all(|b| b.is_ascii_digit())
                && (!host.contains(':') || host.ends_with(']')) =>
        {
            host
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::NodeId;

    fn node(id: u64, name: &str, address: &str) -> Node {
        Node::new(NodeId(id), name.into(), address.parse().unwrap())
    }

    #[test]
    fn nodes_go_by_many_names() {
        let nodes = [
            node(1, "abaci-app-0", "10.0.0.1:80"),
            node(2, "abaci-app-1", "[fd00::1]:80"),
            node(3, "x.one", "10.0.0.3:80"),
            node(4, "x.two", "10.0.0.3:81"),
        ];
        for (name, want) in [
            ("abaci-app-0", Some(1)),
            ("ABACI-app-0", Some(1)),
            ("abaci-app-0:20202", Some(1)),
            ("abaci-app-1.abaci.default.svc.cluster.local", Some(2)),
            ("10.0.0.1", Some(1)),
            ("10.0.0.1:20202", Some(1)),
            ("[fd00::1]:20202", Some(2)),
            ("fd00::1", Some(2)),
            ("10.0.0.3:81", Some(4)),
            ("10.0.0.3", None),
            ("x", None),
            ("x.one", Some(3)),
            ("abaci-app-2", None),
            ("evil.example", None),
            ("", None),
        ] {
            assert_eq!(find(&nodes, name).map(|node| node.id.0), want, "{name}");
        }
    }

    #[test]
    fn a_pod_that_moved_keeps_its_name() {
        let mut nodes = [node(1, "app-0", "10.0.0.1:80"), node(2, "app-0", "10.0.0.2:80")];
        assert!(find(&nodes, "app-0").is_none(), "two members, neither is meant");
        nodes[0].presence = Presence::Draining;
        assert_eq!(find(&nodes, "app-0").map(|node| node.id.0), Some(2));
        nodes[1].name = "10.0.0.2:80".into();
        assert_eq!(find(&nodes, "app-0").map(|node| node.id.0), Some(1), "nobody else is");
    }
}
