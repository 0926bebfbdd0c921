//! What a plan stores, cut into tasks for workers.

use crate::dedup::plan::Step;
use crate::disk::Reader;
use crate::error::Result;
use crate::units::{ClusterBits, GuestCluster, to_usize};

/// Bytes that a worker reads, names and writes in one go.
pub(super) const TASK: u64 = 1 << 20;

/// A run of stored clusters: one after the other in the file, from several places of the disk.
#[derive(Default)]
pub(super) struct Task {
    /// The number of the first stored cluster.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
    /// Where they come from.
    pub(super) pieces: Vec<(GuestCluster, u64)>,
    /// Which of them, counted from `first`, enter the pool.
    pub(super) members: Vec<Member>,
    /// How many layers use those of the others that have not only one, as runs counted from `first`.
    pub(super) users: Vec<(u64, u64, u64)>,
}

#[derive(Clone, Copy)]
pub(super) struct Member {
    pub(super) at: u64,
    /// The lowest place of a disk that uses it.
    pub(super) place: GuestCluster,
    /// Guest clusters that use it.
    pub(super) sharers: u64,
}

/// Collects steps into tasks.
pub(super) struct Tasks {
    per_task: u64,
    /// Those that are full.
    pub(super) done: Vec<Task>,
    open: Task,
}

impl Tasks {
    /// Tasks of up to `per_task` clusters.
    pub(super) fn new(per_task: u64) -> Self {
        Self { per_task, done: Vec::new(), open: Task::default() }
    }

    fn add(&mut self, guest: GuestCluster, count: u64, users: u64) {
        let (mut guest, mut count) = (guest, count);
        while count > 0 {
            let some = count.min(self.per_task - self.open.count);
            match self.open.pieces.last_mut() {
                Some((start, len)) if start.0 + *len == guest.0 => *len += some,
                _ => self.open.pieces.push((guest, some)),
            }
            if users > 1 {
                self.open.users.push((self.open.count, some, users));
            }
            self.open.count += some;
            guest = GuestCluster(guest.0 + some);
            count -= some;
            if self.open.count == self.per_task {
                self.close();
            }
        }
    }

    /// Adds what `step` stores.
    pub(super) fn step(&mut self, step: &Step) {
        match *step {
            Step::Private { guest, count, users } => self.add(guest, count, users),
            Step::Member { guest, sharers, place } => {
                self.open.members.push(Member { at: self.open.count, place, sharers });
                self.add(guest, 1, 1);
            }
            Step::Shared { .. } | Step::Zero { .. } | Step::Inherited { .. } | Step::InheritedTable { .. } => {}
        }
    }

    /// Ends the task that is being filled.
    pub(super) fn close(&mut self) {
        let next = Task { first: self.open.first + self.open.count, ..Task::default() };
        let done = std::mem::replace(&mut self.open, next);
        if done.count > 0 {
            self.done.push(done);
        }
    }
}

impl Task {
    /// How many layers use the cluster at `at`, counted from `first`, which is no member.
    pub(super) fn users_of(&self, at: u64) -> u64 {
        let run =
            self.users.partition_point(|(start, ..)| *start <= at).checked_sub(1).and_then(|run| self.users.get(run));
        run.filter(|(start, count, _)| at < start + count).map_or(1, |(.., users)| *users)
    }

    /// Reads the clusters into `content`.
    pub(super) fn read(&self, reader: &mut Reader<'_>, bits: ClusterBits, content: &mut [u8]) -> Result<()> {
        let mut rest = content;
        for (guest, count) in &self.pieces {
            let (piece, after) = rest.split_at_mut(to_usize(count * bits.bytes()));
            reader.read(guest.offset(bits).0, piece)?;
            rest = after;
        }
        Ok(())
    }
}
