//! How far an operation is, told to whoever wants to show it.
//!
//! ```
//! use std::sync::Mutex;
//! use dedup_img::{Phase, Progress};
//!
//! #[derive(Default)]
//! struct Percent(Mutex<(Option<Phase>, u64)>);
//!
//! impl Progress for Percent {
//!     fn phase(&self, phase: &Phase) {
//!         *self.0.lock().unwrap() = (Some(*phase), 0);
//!     }
//!     fn advance(&self, bytes: u64) {
//!         let (phase, done) = &mut *self.0.lock().unwrap();
//!         *done += bytes;
//!         if let Some(phase) = phase {
//!             eprintln!("{}: {:.0} % of all", phase.title, phase.at(*done) * 100.0);
//!         }
//!     }
//! }
//! ```
//!
//! What is told never runs backwards: a phase begins where the one before it was, or later, and what is done of it is at most its
//! total.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::notice::Notice;

/// A phase of an operation, as it begins.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Phase {
    /// What is done, in a word or two.
    pub title: &'static str,
    /// How many bytes there are to do; 0 where that is not known, or where there is nothing to do.
    pub total: u64,
    /// Which part of the whole operation the phase is, as fractions of it from 0 to 1: where it begins.
    pub begin: f64,
    /// Where it ends.
    pub end: f64,
}

impl Phase {
    /// How far the whole operation is, from 0 to 1, when `done` bytes of the phase are done.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a fraction for people")]
    pub fn at(&self, done: u64) -> f64 {
        match self.total {
            0 => self.begin,
            total if done >= total => self.end,
            total => self.begin + (self.end - self.begin) * (done as f64 / total as f64),
        }
    }
}

/// Receives the progress of an operation. Methods may be called from any worker thread, one at a time.
pub trait Progress: Send + Sync {
    /// A phase begins. Phases that find nothing to do may not come.
    fn phase(&self, phase: &Phase);
    /// `bytes` more bytes of the phase are done.
    fn advance(&self, bytes: u64);
    /// There is something to say that is no failure.
    fn notice(&self, _notice: &Notice) {}
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _: &Phase) {}
    fn advance(&self, _: u64) {}
}

/// A phase as its operation plans it: its title, and which part it is of the operation or of the section of it that
/// [`Meter::within`] has begun, in percent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stage(pub &'static str, pub u8, pub u8);

/// The only one that tells a [`Progress`] of phases, and so the one who sees to it that nothing runs backwards. An operation calls
/// [`Meter::start`] once. What it does over and over within a phase (an inspection between two passes) is given a silent one.
#[derive(Clone)]
pub(crate) struct Meter {
    progress: Arc<dyn Progress>,
    state: Arc<Mutex<State>>,
}

struct State {
    /// The section of the operation that stages are a part of.
    section: (f64, f64),
    /// The phase, of which so many bytes are done.
    phase: Phase,
    done: u64,
}

/// Where every operation begins.
const BEGIN: State = State { section: (0.0, 1.0), phase: Phase { title: "", total: 0, begin: 0.0, end: 0.0 }, done: 0 };

impl State {
    fn position(&self) -> f64 {
        self.phase.at(self.done)
    }
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter").field("phase", &self.state().phase).finish_non_exhaustive()
    }
}

impl Meter {
    pub(crate) fn new(progress: Arc<dyn Progress>) -> Self {
        Self { progress, state: Arc::new(Mutex::new(BEGIN)) }
    }

    /// One that tells nobody.
    pub(crate) fn silent() -> Self {
        Self::new(Arc::new(Silent))
    }

    /// An operation begins.
    pub(crate) fn start(&self) {
        *self.state() = BEGIN;
    }

    /// The stages that follow are parts of this section of the operation, from 0 to 1.
    pub(crate) fn within(&self, begin: f64, end: f64) {
        let mut state = self.state();
        let begin = begin.max(state.position());
        state.section = (begin, end.max(begin));
    }

    /// What was tried and shown so far was in vain: the stages that follow are parts of what is left of the section.
    pub(crate) fn anew(&self) {
        let mut state = self.state();
        let begin = state.position();
        state.section = (begin, state.section.1.max(begin));
    }

    /// A stage of `total` bytes begins, 0 where that is not known.
    pub(crate) fn begin(&self, Stage(title, begin, end): Stage, total: u64) {
        let mut state = self.state();
        let (first, last) = state.section;
        let place = |percent: u8| first + (last - first) * f64::from(percent) / 100.0;
        let begin = place(begin).max(state.position());
        state.phase = Phase { title, total, begin, end: place(end).max(begin) };
        state.done = 0;
        self.progress.phase(&state.phase);
    }

    /// Passes on what there is to say.
    pub(crate) fn notice(&self, notice: &Notice) {
        self.progress.notice(notice);
    }

    /// `bytes` more bytes of the stage are done. More than there are to do count as none.
    pub(crate) fn advance(&self, bytes: u64) {
        let mut state = self.state();
        let bytes = match state.phase.total {
            0 => bytes,
            total => bytes.min(total.saturating_sub(state.done)),
        };
        if bytes > 0 {
            state.done += bytes;
            self.progress.advance(bytes);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where an operation was, whenever it told.
    #[derive(Default)]
    struct Seen(Mutex<(Option<Phase>, u64, Vec<f64>)>);

    impl Progress for Seen {
        fn phase(&self, phase: &Phase) {
            let mut seen = self.0.lock().unwrap();
            (seen.0, seen.1) = (Some(*phase), 0);
            seen.2.push(phase.begin);
        }
        fn advance(&self, bytes: u64) {
            let mut seen = self.0.lock().unwrap();
            seen.1 += bytes;
            let at = seen.0.unwrap().at(seen.1);
            seen.2.push(at);
        }
    }

    impl Seen {
        fn all(&self) -> Vec<f64> {
            self.0.lock().unwrap().2.clone()
        }
    }

    #[test]
    fn phases_follow_each_other_by_their_weights() {
        let seen = Arc::new(Seen::default());
        let meter = Meter::new(Arc::<Seen>::clone(&seen));
        meter.start();
        meter.begin(Stage("a", 0, 25), 10);
        meter.advance(5);
        meter.advance(5);
        meter.within(0.25, 1.0);
        meter.begin(Stage("b", 0, 50), 4);
        meter.advance(4);
        meter.begin(Stage("c", 50, 100), 0);
        assert_eq!(seen.all(), [0.0, 0.125, 0.25, 0.25, 0.625, 0.625]);
    }

    /// A phase that comes again, one that has more bytes than were announced, and a way that was given up.
    #[test]
    fn nothing_runs_backwards() {
        let seen = Arc::new(Seen::default());
        let meter = Meter::new(Arc::<Seen>::clone(&seen));
        meter.start();
        meter.begin(Stage("stream", 0, 100), 10);
        meter.advance(5);
        meter.anew();
        meter.begin(Stage("scan", 0, 50), 2);
        meter.advance(7);
        meter.begin(Stage("scan", 0, 50), 2);
        meter.advance(1);
        meter.begin(Stage("write", 50, 100), 2);
        meter.advance(1);
        meter.advance(u64::MAX);
        assert_eq!(seen.all(), [0.0, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75, 0.875, 1.0]);
    }

    #[test]
    fn another_operation_begins_at_the_beginning() {
        let seen = Arc::new(Seen::default());
        let meter = Meter::new(Arc::<Seen>::clone(&seen));
        for _ in 0..2 {
            meter.start();
            meter.begin(Stage("a", 0, 100), 1);
            meter.advance(1);
        }
        assert_eq!(seen.all(), [0.0, 1.0, 0.0, 1.0]);
    }
}
