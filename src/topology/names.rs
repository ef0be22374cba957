//! Finds a member by whatever a node or an operator calls it.

use super::Node;

/// The node that goes by `name`.
pub(super) fn find<'n>(nodes: &'n [Node], name: &str) -> Option<&'n Node> {
    nodes.iter().find(|node| &*node.name == name)
}
