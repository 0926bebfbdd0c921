//! Progress: a bar on a terminal, qemu-img's line elsewhere, or one line for each SIGUSR1.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dedup_img::{Phase, Progress};
use indicatif::{ProgressBar, ProgressStyle};

use crate::interrupt;

/// Hundredths of a percent from one line to the next: qemu-img's step, so that a pipe or a log gets a hundred lines and not
/// thousands; on a terminal nothing is kept, and it may be finer.
const STEP: u32 = 100;
const STEP_ON_A_TERMINAL: u32 = 1;
/// All is done, in hundredths of a percent.
const WHOLE: u32 = 10_000;

/// Shows progress.
pub(crate) struct Shown(Mode);

enum Mode {
    Bar(ProgressBar),
    Line(Mutex<Line>),
    /// Without -p: only where somebody asks.
    Asked(Mutex<Position>),
}

/// `    (12.34/100%)` and a carriage return.
struct Line {
    on_stderr: bool,
    step: u32,
    position: Position,
    /// What was shown last, in hundredths of a percent.
    shown: Option<u32>,
}

/// Where an operation is.
#[derive(Default)]
struct Position {
    phase: Option<Phase>,
    done: u64,
}

impl Shown {
    /// Progress for a command whose standard output is JSON, or is free for qemu-img's line.
    pub(crate) fn new(json: bool) -> Self {
        if io::stderr().is_terminal() && (json || io::stdout().is_terminal()) {
            return Self(Mode::Bar(ProgressBar::no_length().with_style(style())));
        }
        let is_terminal = if json { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
        let step = if is_terminal { STEP_ON_A_TERMINAL } else { STEP };
        Self(Mode::Line(Mutex::new(Line { on_stderr: json, step, position: Position::default(), shown: None })))
    }

    /// Progress for who asks.
    pub(crate) fn when_asked() -> Self {
        Self(Mode::Asked(Mutex::default()))
    }

    /// Lets something be printed beside the progress.
    pub(crate) fn aside(&self, print: impl FnOnce()) {
        match &self.0 {
            Mode::Bar(bar) => bar.suspend(print),
            Mode::Line(_) | Mode::Asked(_) => print(),
        }
    }

    /// Leaves a clean line.
    pub(crate) fn finish(&self, done: bool) {
        match &self.0 {
            Mode::Bar(bar) => bar.finish_and_clear(),
            Mode::Line(line) => {
                let mut line = held(line);
                if done {
                    line.show(WHOLE);
                }
                line.write("\n");
            }
            Mode::Asked(_) => {}
        }
    }
}

/// Fits into 80 columns.
fn style() -> ProgressStyle {
    let template = "{msg:10} [{bar:20}] {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>3} left";
    ProgressStyle::with_template(template).map_or_else(|_| ProgressStyle::default_bar(), |s| s.progress_chars("=> "))
}

fn held<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Progress for Shown {
    fn phase(&self, phase: &Phase) {
        match &self.0 {
            Mode::Bar(bar) => {
                bar.set_message(phase.title);
                bar.set_length(phase.total);
                bar.reset();
                bar.enable_steady_tick(Duration::from_millis(200));
            }
            Mode::Line(line) => {
                let mut line = held(line);
                line.position = Position { phase: Some(*phase), done: 0 };
                line.show_position();
            }
            Mode::Asked(position) => *held(position) = Position { phase: Some(*phase), done: 0 },
        }
    }

    fn advance(&self, bytes: u64) {
        match &self.0 {
            Mode::Bar(bar) => bar.inc(bytes),
            Mode::Line(line) => {
                let mut line = held(line);
                line.position.done += bytes;
                line.show_position();
            }
            Mode::Asked(position) => {
                let mut position = held(position);
                position.done += bytes;
                if interrupt::asked() {
                    // Nobody reads it who has asked: no failure.
                    let _ = writeln!(io::stderr().lock(), "{}", text(position.at()));
                }
            }
        }
    }
}

impl Position {
    /// In hundredths of a percent; all is done only when the operation has ended.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 10,000")]
    fn at(&self) -> u32 {
        let part = self.phase.map_or(0.0, |phase| phase.at(self.done));
        ((part * f64::from(WHOLE)) as u32).min(WHOLE - 1)
    }
}

fn text(position: u32) -> String {
    format!("    ({:.2}/100%)", f64::from(position) / 100.0)
}

impl Line {
    fn show_position(&mut self) {
        let position = self.position.at();
        self.show(position - position % self.step);
    }

    fn show(&mut self, position: u32) {
        if self.shown.is_none_or(|shown| position > shown) {
            self.shown = Some(position);
            self.write(&format!("{}\r", text(position)));
        }
    }

    fn write(&self, text: &str) {
        // Progress that nobody reads is no failure.
        let _ = if self.on_stderr {
            io::stderr().write_all(text.as_bytes())
        } else {
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        };
    }
}
