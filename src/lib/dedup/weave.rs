//! What the layers of a woven row have in common, with no look at any content.
//!
//! A scan leaves out what a layer has at the same place of the file as the layer above it. Here every cluster that was scanned
//! learns how many layers use it, and every L2 table of the output in how many layers it is the same.

use crate::dedup::{INDEX_BITS, Run, peek};
use crate::disk::history::Weave;
use crate::error::{OrInternal, Result};
use crate::sort::record::record;
use crate::sort::sequence::{Sequence, Spill, Words};
use crate::units::to_usize;

/// What follows from the places of the layers' clusters.
pub(crate) struct Woven {
    /// The row, in clusters.
    pub weave: Weave,
    /// Clusters that a layer has as the layer above, where that one has any, in the order of the row.
    pub inherited: Sequence<Inherited>,
    /// Scanned clusters that more than one layer uses, in the order of the row.
    pub users: Sequence<Users>,
    /// How many layers use each L2 table, in the order of the tables.
    pub tables: Sequence<TableUsers>,
    /// L2 tables.
    pub l2_tables: u64,
    /// Clusters that layers use as the layer above.
    pub inherited_clusters: u64,
}

/// A run of clusters that a layer has as the layer above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inherited {
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Whether it is all that an L2 table maps: the layers have the table in common.
    pub(crate) table: bool,
}

record!(inherited_words: Inherited { start: 64, len: 63, table: 1 });

/// A run of clusters that the same number of layers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Users {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) users: u64,
}

record!(users_words: Users { start: INDEX_BITS, len: INDEX_BITS, users: 48 });

/// A run of L2 tables that the same number of layers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct TableUsers {
    pub(crate) layers: u64,
    pub(crate) tables: u64,
}

record!(table_users_words: TableUsers { layers: 64, tables: 64 });

/// Tells how many layers use scanned clusters, asked for in the order of the row.
pub(crate) struct UserCounts<'a> {
    runs: Option<Words<'a, Users>>,
    run: Users,
}

impl<'a> UserCounts<'a> {
    pub(crate) fn new(woven: Option<&'a Woven>) -> Self {
        Self { runs: woven.map(|woven| woven.users.iter()), run: Users { start: 0, len: 0, users: 1 } }
    }

    /// How many layers use `cluster`, and the cluster behind it for which that may change.
    pub(crate) fn of(&mut self, cluster: u64) -> Result<(u64, u64)> {
        while self.run.start + self.run.len <= cluster {
            match self.runs.as_mut().and_then(Iterator::next).transpose()? {
                Some(run) => self.run = run,
                None => return Ok((1, u64::MAX)),
            }
        }
        match cluster < self.run.start {
            true => Ok((1, self.run.start)),
            false => Ok((self.run.users, self.run.start + self.run.len)),
        }
    }
}

/// Weaves what a level has: `runs` of clusters that are not zero, `zeros` that a backing file must not show through, and clusters
/// `in_common` with the layer above, all as runs in the order of the row. An L2 table has `entries` entries.
pub(crate) fn weave(
    weave: Weave,
    entries: u64,
    (runs, zeros): (&Sequence<Run>, &Sequence<Run>),
    in_common: impl Iterator<Item = Result<Run>>,
    spill: &Spill,
) -> Result<Woven> {
    let mut loom = Loom::new(weave, entries, spill);
    let mut sources = (runs.iter().peekable(), zeros.iter().peekable(), in_common.peekable());
    loop {
        let starts = [peek(&mut sources.0)?, peek(&mut sources.1)?, peek(&mut sources.2)?];
        let starts = starts.map(|run| run.map(|run| run.start));
        let Some(first) = starts.iter().flatten().min().copied() else { break };
        let (kind, run) = match starts.map(|start| start == Some(first)) {
            [true, ..] => (Kind::Data, sources.0.next()),
            [_, true, _] => (Kind::Zero, sources.1.next()),
            _ => (Kind::Inherited, sources.2.next()),
        };
        let run = run.transpose()?.or_internal("a run that was seen is gone")?;
        let mut at = run.start;
        while at < run.end() {
            let end = (at - at % weave.unit + weave.unit).min(run.end());
            loom.add(kind, at, end - at)?;
            at = end;
        }
    }
    loom.finish()
}

#[derive(Clone, Copy)]
enum Kind {
    Data,
    Zero,
    Inherited,
}

const OUTSIDE: &str = "a cluster lies outside of its unit";

/// Nothing is mapped.
const NONE: u32 = 0;
/// Zeros.
const ZERO: u32 = 1;
/// The first scanned cluster of a group.
const FIRST: u32 = 2;

/// An L2 table of a layer in the current unit.
#[derive(Clone, Copy, Default)]
struct Table {
    /// Entries in use.
    mapped: u64,
    /// Whether one of them is not inherited.
    own: bool,
    /// Its number in the group.
    number: usize,
}

/// One unit of one layer.
struct Unit {
    /// For each cluster which scanned cluster of the group it is.
    owners: Vec<u32>,
    tables: Vec<Table>,
}

impl Unit {
    fn clear(&mut self) {
        self.owners.fill(NONE);
        self.tables.fill(Table::default());
    }
}

/// Goes along the row, a unit at a time.
struct Loom {
    weave: Weave,
    entries: u64,
    unit: u64,
    above: Unit,
    now: Unit,
    /// Runs of the unit that are inherited.
    pending: Vec<(u64, u64)>,
    /// The scanned clusters of the group, as runs.
    scanned: Vec<(u64, u64)>,
    /// How many layers use each of them.
    users: Vec<u32>,
    /// How many layers use each table of the group.
    group_tables: Vec<u64>,
    table_run: TableUsers,
    woven: Woven,
}

impl Loom {
    fn new(weave: Weave, entries: u64, spill: &Spill) -> Self {
        let unit = || Unit {
            owners: vec![NONE; to_usize(weave.unit)],
            tables: vec![Table::default(); to_usize(weave.unit / entries)],
        };
        let small = spill.share(4);
        let woven = Woven {
            weave,
            inherited: Sequence::new(&small),
            users: Sequence::new(&small),
            tables: Sequence::new(&small),
            l2_tables: 0,
            inherited_clusters: 0,
        };
        Self {
            weave,
            entries,
            unit: 0,
            above: unit(),
            now: unit(),
            pending: Vec::new(),
            scanned: Vec::new(),
            users: Vec::new(),
            group_tables: Vec::new(),
            table_run: TableUsers::default(),
            woven,
        }
    }

    /// Adds a run that lies in one unit.
    fn add(&mut self, kind: Kind, start: u64, len: u64) -> Result<()> {
        let unit = start / self.weave.unit;
        if unit != self.unit {
            self.end_unit()?;
            std::mem::swap(&mut self.above, &mut self.now);
            self.now.clear();
            if self.weave.group(unit) != self.weave.group(self.unit) {
                self.end_group()?;
                self.above.clear();
            } else if unit != self.unit + 1 {
                // The layer between them has nothing here.
                self.above.clear();
            }
            self.unit = unit;
        }
        match kind {
            Kind::Inherited => self.pending.push((start, len)),
            Kind::Data => self.scanned.push((start, len)),
            Kind::Zero => {}
        }
        for row in start..start + len {
            let at = to_usize(row % self.weave.unit);
            let above = self.above.owners.get(at).copied().or_internal(OUTSIDE)?;
            let owner = match kind {
                Kind::Zero => ZERO,
                Kind::Inherited => above,
                Kind::Data => {
                    self.users.push(0);
                    let number = u32::try_from(self.users.len() - 1).ok().and_then(|number| number.checked_add(FIRST));
                    number.or_internal("more clusters in a group of layers than can be numbered")?
                }
            };
            if owner == NONE {
                continue;
            }
            if let Some(number) = owner.checked_sub(FIRST) {
                *self.users.get_mut(number as usize).or_internal("a cluster of a layer above was not scanned")? += 1;
            }
            let inherited = matches!(kind, Kind::Inherited);
            self.woven.inherited_clusters += u64::from(inherited && owner != ZERO);
            *self.now.owners.get_mut(at).or_internal(OUTSIDE)? = owner;
            let table = to_usize(row % self.weave.unit / self.entries);
            let table = self.now.tables.get_mut(table).or_internal(OUTSIDE)?;
            table.mapped += 1;
            table.own |= !inherited;
        }
        Ok(())
    }

    fn end_unit(&mut self) -> Result<()> {
        let base = self.unit * self.weave.unit;
        let mut pending = self.pending.iter().copied().peekable();
        for ((table, above), start) in
            self.now.tables.iter_mut().zip(&self.above.tables).zip((base..).step_by(step(self.entries)))
        {
            let end = start + self.entries;
            let is_shared = !table.own && table.mapped == above.mapped;
            if table.mapped > 0 && is_shared {
                table.number = above.number;
                *self.group_tables.get_mut(above.number).or_internal("a table of the layer above has no number")? += 1;
                let all = Inherited { start, len: self.entries, table: true };
                self.woven.inherited.push(all)?;
            } else if table.mapped > 0 {
                table.number = self.group_tables.len();
                self.group_tables.push(1);
            }
            while let Some(&(first, len)) = pending.peek().filter(|(first, _)| *first < end) {
                if table.mapped > 0 && !is_shared {
                    let range = first.max(start)..(first + len).min(end);
                    mapped_runs(&self.now.owners, self.weave.unit, range, &mut self.woven.inherited)?;
                }
                if first + len > end {
                    break;
                }
                pending.next();
            }
        }
        self.pending.clear();
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        let mut run = Users { start: 0, len: 0, users: 0 };
        let rows = self.scanned.drain(..).flat_map(|(start, len)| start..start + len);
        let scanned = rows.zip(self.users.drain(..).map(u64::from));
        for (start, users) in scanned.filter(|(_, users)| *users > 1) {
            if run.users == users && run.start + run.len == start {
                run.len += 1;
                continue;
            }
            if run.len > 0 {
                self.woven.users.push(run)?;
            }
            run = Users { start, len: 1, users };
        }
        if run.len > 0 {
            self.woven.users.push(run)?;
        }
        self.woven.l2_tables += self.group_tables.len() as u64;
        for layers in self.group_tables.drain(..) {
            if self.table_run.layers != layers {
                end_run(&mut self.table_run, &mut self.woven.tables)?;
            }
            self.table_run = TableUsers { layers, tables: self.table_run.tables + 1 };
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Woven> {
        self.end_unit()?;
        self.end_group()?;
        end_run(&mut self.table_run, &mut self.woven.tables)?;
        Ok(self.woven)
    }
}

fn step(entries: u64) -> usize {
    to_usize(entries)
}

fn end_run(run: &mut TableUsers, tables: &mut Sequence<TableUsers>) -> Result<()> {
    let run = std::mem::take(run);
    if run.tables > 0 { tables.push(run) } else { Ok(()) }
}

/// Emits the parts of `range` that are mapped.
fn mapped_runs(owners: &[u32], unit: u64, range: std::ops::Range<u64>, runs: &mut Sequence<Inherited>) -> Result<()> {
    let mut open: Option<Inherited> = None;
    for row in range {
        let owner = owners.get(to_usize(row % unit)).copied().or_internal(OUTSIDE)?;
        match &mut open {
            Some(run) if owner != NONE => run.len += 1,
            None if owner != NONE => open = Some(Inherited { start: row, len: 1, table: false }),
            open => {
                if let Some(run) = open.take() {
                    runs.push(run)?;
                }
            }
        }
    }
    open.map_or(Ok(()), |run| runs.push(run))
}
