//! What the clients do next. Pure: chance is an argument.
//!
//! Keys do not grow for ever: a list that holds [`LIST`] values, and a register that was set
//! [`REGISTER`] times or whose last write ended nobody knows how, is left for a new one of the next
//! generation. The generation before stays in use for reading.

use fastrand::Rng;

use super::history::{Key, Kind, Operation, Value};

/// Appends to one list.
const LIST: u32 = 64;
/// Writes to one register.
const REGISTER: u32 = 256;

/// What is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Workload {
    /// Values are appended to lists.
    Append,
    /// Registers are set.
    Register,
    /// Both.
    Both,
}

#[derive(Debug)]
pub(super) struct Plan {
    workload: Workload,
    clients: u32,
    keys: u32,
    /// Lists, shared by all clients.
    lists: Vec<Slot>,
    /// Registers, `keys` for each client.
    registers: Vec<Slot>,
    /// By client: the last number written, and where, if nothing was done since.
    numbers: Vec<u32>,
    last: Vec<Option<Key>>,
    writes: u64,
    closed: Vec<Key>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    generation: u32,
    writes: u32,
}

impl Plan {
    pub(super) fn new(workload: Workload, clients: u32, keys: u32) -> Self {
        let many = |n: u32| vec![Slot::default(); n as usize];
        Self {
            workload,
            clients,
            keys,
            lists: many(keys),
            registers: many(keys.saturating_mul(clients)),
            numbers: vec![0; clients as usize],
            last: vec![None; clients as usize],
            writes: 0,
            closed: Vec::new(),
        }
    }

    /// Half of what a client does is a write; and after a write it mostly looks at what it wrote.
    pub(super) fn next(&mut self, client: u32, rng: &mut Rng) -> Operation {
        let kind = match self.workload {
            Workload::Append => Kind::List,
            Workload::Register => Kind::Register,
            Workload::Both if rng.bool() => Kind::List,
            Workload::Both => Kind::Register,
        };
        let last = self.last.get_mut(client as usize).and_then(Option::take);
        match last {
            Some(key) if rng.u32(..4) > 0 => Operation::Read(key),
            _ if rng.u32(..3) > 0 => self.write(kind, client, rng),
            _ => self.read(kind, rng),
        }
    }

    fn write(&mut self, kind: Kind, client: u32, rng: &mut Rng) -> Operation {
        let slot = rng.u32(..self.keys.max(1));
        let (slot, most) = match kind {
            Kind::List => (slot, LIST),
            Kind::Register => (client * self.keys + slot, REGISTER),
        };
        if self.slot(kind, slot).is_some_and(|slot| slot.writes >= most) {
            self.anew(kind, slot);
        }
        let generation = self.slot(kind, slot).map_or(0, |slot| {
            slot.writes += 1;
            slot.generation
        });
        let number = self.numbers.get_mut(client as usize).map_or(0, |number| {
            *number += 1;
            *number
        });
        self.writes += 1;
        let key = Key { kind, slot, generation };
        if let Some(last) = self.last.get_mut(client as usize) {
            *last = Some(key);
        }
        Operation::Write(key, Value { client, number })
    }

    fn read(&mut self, kind: Kind, rng: &mut Rng) -> Operation {
        let slots = match kind {
            Kind::List => self.keys,
            Kind::Register => self.keys * self.clients,
        };
        let slot = rng.u32(..slots.max(1));
        let newest = self.slot(kind, slot).map_or(0, |slot| slot.generation);
        let generation = if rng.u32(..4) == 0 { newest.saturating_sub(1) } else { newest };
        Operation::Read(Key { kind, slot, generation })
    }

    /// A write ended, nobody knows how.
    pub(super) fn unsure(&mut self, key: Key) {
        let is_newest =
            self.slot(key.kind, key.slot).is_some_and(|slot| slot.generation == key.generation);
        if key.kind == Kind::Register && is_newest {
            self.anew(key.kind, key.slot);
        }
    }

    /// How many writes were planned.
    pub(super) fn writes(&self) -> u64 {
        self.writes
    }

    /// Keys that nobody will be sent to any more.
    pub(super) fn closed(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.closed)
    }

    fn slot(&mut self, kind: Kind, slot: u32) -> Option<&mut Slot> {
        let slots = match kind {
            Kind::List => &mut self.lists,
            Kind::Register => &mut self.registers,
        };
        slots.get_mut(slot as usize)
    }

    fn anew(&mut self, kind: Kind, slot: u32) {
        let Some(found) = self.slot(kind, slot) else { return };
        *found = Slot { generation: found.generation + 1, writes: 0 };
        if let Some(generation) = found.generation.checked_sub(2) {
            self.closed.push(Key { kind, slot, generation });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn values_are_unique_registers_have_one_writer_and_no_key_grows_for_ever() {
        let (mut plan, mut rng) = (Plan::new(Workload::Both, 4, 2), Rng::with_seed(1));
        let (mut values, mut writers) = (BTreeSet::new(), BTreeMap::new());
        let mut sizes = BTreeMap::<Key, u32>::new();
        for n in 0..20_000 {
            if let Operation::Write(key, value) = plan.next(n % 4, &mut rng) {
                assert!(values.insert(value), "{value} twice");
                *sizes.entry(key).or_default() += 1;
                if key.kind == Kind::Register {
                    assert_eq!(*writers.entry(key).or_insert(value.client), value.client);
                }
            }
        }
        assert!(values.len() > 5000 && plan.writes() == values.len() as u64);
        for (key, size) in sizes {
            assert!(size <= if key.kind == Kind::List { LIST } else { REGISTER });
        }
    }

    #[test]
    fn a_register_is_left_after_a_write_of_unknown_end() {
        let (mut plan, mut rng) = (Plan::new(Workload::Register, 1, 1), Rng::with_seed(1));
        for generation in 0..3 {
            let key = Key { kind: Kind::Register, slot: 0, generation };
            let write = plan.write(Kind::Register, 0, &mut rng);
            assert_eq!(write.key(), key);
            plan.unsure(key);
            plan.unsure(key);
        }
        let closed = [0, 1].map(|generation| Key { kind: Kind::Register, slot: 0, generation });
        assert_eq!(plan.closed(), closed);
        assert_eq!(plan.closed(), []);
    }
}
