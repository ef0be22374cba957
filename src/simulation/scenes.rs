//! What once went wrong in a night, alone and by a script: one test each.

use std::{cell::RefCell, future::Future, rc::Rc, time::Duration};

use tokio::{
    task::spawn_local,
    time::{sleep, timeout},
};

use super::{
    clients::Client,
    faults::{self, Instances},
    litegate::Litegate,
    run,
    world::{Consul, INSTANCES, NODES, World},
};
use crate::verify::history::{End, Outcome, Value};

/// Longer than a lease takes to expire.
const EXPIRED: Duration = Duration::from_secs(22);

/// A cluster whose primary is node 0, and two instances that know it.
struct Scene {
    world: Rc<World>,
    instances: Rc<Instances>,
}

impl Scene {
    fn client(&self, number: u32) -> Client {
        Client::new(&self.world, &Rc::new(RefCell::new(Vec::new())), number)
    }

    /// Waits until an instance believes in this primary.
    async fn believed(&self, instance: usize, node: usize) {
        let believed = async {
            loop {
                let litegate = self.instances[instance].borrow().clone();
                if litegate.and_then(|it| it.primary()) == Some(format!("n{node}")) {
                    return;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = timeout(Duration::from_secs(60), believed).await;
        assert!(waited.is_ok(), "litegate {instance} never believes in n{node}");
    }
}

/// Runs a script at the app's port.
fn play<F: Future<Output = ()>>(script: impl FnOnce(Scene) -> F) {
    let scene = |network| async {
        let mut world = World::new(1, network);
        let it = Rc::get_mut(&mut world).unwrap();
        (it.through_proxy, it.replicas, it.asks_consul, it.is_scene) = (false, 0, false, true);
        let instances: Rc<Instances> = Rc::default();
        for instance in 0..INSTANCES {
            (0..NODES).for_each(|node| {
                faults::delayed(&world, instance, node, Duration::from_millis(1));
            });
        }
        for node in 0..NODES {
            world.change(|state| state.nodes[node].behind = Duration::from_millis(5));
            world.start(node);
            sleep(Duration::from_secs(2)).await;
        }
        for (instance, place) in instances.iter().enumerate() {
            place.replace(Some(Litegate::start(&world, instance, None)));
        }
        let scene = Scene { world: Rc::clone(&world), instances };
        scene.believed(0, 0).await;
        scene.believed(1, 0).await;
        sleep(Duration::from_secs(2)).await;
        script(scene).await;
        assert!(world.broken.borrow().is_empty(), "{:?}", world.broken.borrow());
    };
    assert!(run(1, scene).is_some(), "it panicked");
}

fn values(end: &End) -> Vec<Value> {
    match &end.outcome {
        Outcome::Values(values) => values.clone(),
        other => panic!("{other:?}"),
    }
}

/// Seeds 787 and 862: numbers that a tail on a disk has, too, hid that a write is lost.
#[test]
fn a_client_is_told_that_a_node_with_a_tail_of_its_own_does_not_have_its_write() {
    play(|scene| async move {
        let world = Rc::clone(&scene.world);
        let (mut first, mut second, mut other) =
            (scene.client(1), scene.client(2), scene.client(3));
        first.write(0).await;
        sleep(Duration::from_secs(1)).await;
        // Replicas lag: what node 0 commits from here on is on its disk alone.
        world.change(|state| {
            state.nodes.iter_mut().for_each(|node| node.behind = Duration::from_secs(60));
        });
        first.write(0).await;
        first.write(0).await;
        world.stop(0).await;
        let is_primary = |node: usize| world.until(move |s| s.nodes[node].primary);
        tokio::select! { () = is_primary(1) => {}, () = is_primary(2) => {} }
        let next = if world.look(|state| state.nodes[1].primary) { 1 } else { 2 };
        scene.believed(0, next).await;
        // The same numbers, and something else.
        assert_eq!(second.write(0).await.outcome, Outcome::Acknowledged);
        assert_eq!(other.write(0).await.outcome, Outcome::Acknowledged);
        sleep(Duration::from_millis(500)).await;
        world.kill(3 - next);
        world.stop(next).await;
        world.start(0);
        scene.believed(0, 0).await;
        let end = second.read(0).await;
        assert_eq!(values(&end), []);
        assert!(end.told_lost, "{end:?}");
        // Who lost nothing is told nothing.
        assert!(!second.read(1).await.told_lost, "told once");
    });
}

/// An instance that does not know the newest primary yet took a token of its for lost.
#[test]
fn an_instance_that_has_not_heard_of_a_token_s_primary_waits_for_news() {
    play(|scene| async move {
        let world = Rc::clone(&scene.world);
        let mut client = scene.client(1);
        client.write(0).await;
        // Its renewal hangs: node 0 keeps its role, node 2 and the writes of whoever knows no better.
        world.change(|state| state.nodes[0].consul = Consul::Hangs);
        sleep(EXPIRED).await;
        world.cut(1, 1, true);
        world.kill(1);
        world.start(1);
        scene.believed(0, 1).await;
        scene.believed(1, 0).await;
        let its = Rc::clone(&world);
        spawn_local(async move {
            sleep(Duration::from_millis(200)).await;
            its.cut(1, 1, false);
        });
        assert_eq!(client.write(0).await.outcome, Outcome::Acknowledged);
        let end = client.read(1).await;
        assert!(!end.told_lost, "{end:?}");
        assert_eq!(values(&end).len(), 2);
    });
}

/// What a primary that was left behind says of its writes is worth nothing.
#[test]
fn a_success_from_a_primary_that_was_left_behind_is_none() {
    play(|scene| async move {
        let world = Rc::clone(&scene.world);
        let mut client = scene.client(1);
        client.write(0).await;
        sleep(Duration::from_secs(1)).await;
        world.change(|state| state.nodes[0].consul = Consul::Hangs);
        sleep(EXPIRED).await;
        world.change(|state| state.nodes[0].app_takes = Duration::from_secs(1));
        world.kill(1);
        let its = Rc::clone(&world);
        spawn_local(async move {
            sleep(Duration::from_millis(300)).await;
            its.start(1);
        });
        let end = client.write(0).await;
        scene.believed(0, 1).await;
        assert!(matches!(end.outcome, Outcome::Ambiguous(_)), "{end:?}");
        assert_eq!(end.status, Some(502));
        let end = client.read(0).await;
        assert_eq!(values(&end).len(), 1);
        assert!(!end.told_lost, "nothing that it was told is lost");
    });
}
