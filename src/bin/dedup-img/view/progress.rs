//! Progress: a bar on a terminal, qemu-img's line elsewhere.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::Duration;

use dedup_img::progress::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// Shows progress.
pub(crate) struct Shown(Mode);

enum Mode {
    Bar(ProgressBar),
    Line(Mutex<Line>),
}

/// `    (12.34/100%)` and a carriage return.
struct Line {
    on_stderr: bool,
    index: u32,
    count: u32,
    done: u64,
    total: u64,
    shown: String,
}

impl Shown {
    /// Progress for a command whose standard output is JSON, or is free for qemu-img's line.
    pub(crate) fn new(json: bool) -> Self {
        if io::stderr().is_terminal() && (json || io::stdout().is_terminal()) {
            return Self(Mode::Bar(ProgressBar::no_length().with_style(style())));
        }
        let line = Line { on_stderr: json, index: 0, count: 1, done: 0, total: 0, shown: String::new() };
        Self(Mode::Line(Mutex::new(line)))
    }

    /// Leaves a clean line.
    pub(crate) fn finish(&self, done: bool) {
        match &self.0 {
            Mode::Bar(bar) => bar.finish_and_clear(),
            Mode::Line(line) => {
                if let Ok(mut line) = line.lock() {
                    if done {
                        (line.index, line.done) = (line.count - 1, line.total);
                        line.show();
                    }
                    line.write("\n");
                }
            }
        }
    }
}

/// Fits into 80 columns.
fn style() -> ProgressStyle {
    let template = "{msg:9} [{bar:20}] {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>3} left";
    ProgressStyle::with_template(template).map_or_else(|_| ProgressStyle::default_bar(), |s| s.progress_chars("=> "))
}

impl Progress for Shown {
    fn phase(&self, index: u32, count: u32, title: &'static str, total: u64) {
        match &self.0 {
            Mode::Bar(bar) => {
                bar.set_message(title);
                bar.set_length(total);
                bar.reset();
                bar.enable_steady_tick(Duration::from_millis(200));
            }
            Mode::Line(line) => {
                if let Ok(mut line) = line.lock() {
                    (line.index, line.count, line.done, line.total) = (index, count.max(1), 0, total);
                    line.show();
                }
            }
        }
    }

    fn advance(&self, bytes: u64) {
        match &self.0 {
            Mode::Bar(bar) => bar.inc(bytes),
            Mode::Line(line) => {
                if let Ok(mut line) = line.lock() {
                    line.done += bytes;
                    line.show();
                }
            }
        }
    }
}

impl Line {
    #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
    fn show(&mut self) {
        let part = if self.total == 0 { 1.0 } else { (self.done as f64 / self.total as f64).min(1.0) };
        let percent = (f64::from(self.index) + part) * 100.0 / f64::from(self.count);
        let text = format!("    ({percent:3.2}/100%)\r");
        if text != self.shown {
            self.write(&text);
            self.shown = text;
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
