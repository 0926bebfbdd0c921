//! A process while it runs: watched through /proc, stopped, continued, killed, and never waited for without end.

use crate::support::{Ran, dedup_command, qemu};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Nothing that these tests wait for takes as long.
const DEADLINE: Duration = Duration::from_secs(60);

/// A child that is killed when the test is over, whatever the outcome.
pub(crate) struct Running {
    child: Option<Child>,
    line: String,
}

impl Running {
    /// Starts the program under test.
    pub(crate) fn dedup_img<I: IntoIterator<Item = OsString>>(args: I) -> Self {
        Self::start(dedup_command(args))
    }

    /// The same, and it heeds the signals that whoever runs the tests ignores, as a job in the background of a script does SIGINT.
    pub(crate) fn heeding<I: IntoIterator<Item = OsString>>(args: I) -> Self {
        Self::start(super::failure::heeding(args))
    }

    /// Starts a prepared command.
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let line = format!("{command:?}");
        Self { child: Some(command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"))), line }
    }

    /// Starts qemu-io on an image, keeps it running through its standard input, and returns when it has answered from the image.
    #[track_caller]
    pub(crate) fn qemu_io<I: IntoIterator<Item = OsString>>(args: I) -> Self {
        let mut running = Self { child: Some(qemu::spawn("qemu-io", args)), line: "qemu-io".into() };
        running.child().stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = String::new();
        let mut answers = BufReader::new(running.child().stdout.as_mut().unwrap());
        answers.read_line(&mut answer).unwrap();
        if !answer.contains("iB") {
            panic!("qemu-io did not open the image: {answer}{}", running.finish().told());
        }
        running
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    /// One of the process's files in /proc; empty once it has ended.
    fn proc(&self, name: &str) -> String {
        let id = self.child.as_ref().unwrap().id();
        fs::read_to_string(format!("/proc/{id}/{name}")).unwrap_or_default()
    }

    /// The number behind a label in one of the files in /proc.
    fn number(&self, file: &str, label: &str) -> u64 {
        let text = self.proc(file);
        let line = text.lines().find_map(|line| line.strip_prefix(label));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Bytes written so far, to whatever file.
    pub(crate) fn written(&self) -> u64 {
        self.number("io", "wchar:")
    }

    /// Bytes read and written in the process's whole life, which has just ended; nobody has waited for it yet.
    #[track_caller]
    pub(crate) fn transferred(&mut self) -> (u64, u64) {
        let begun = Instant::now();
        while !self.proc("status").lines().any(|line| line.starts_with("State:") && line.contains('Z')) {
            assert!(begun.elapsed() < DEADLINE, "waited too long for {}", self.line);
            sleep(Duration::from_micros(200));
        }
        (self.number("io", "rchar:"), self.number("io", "wchar:"))
    }

    /// The highest resident memory so far, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        self.number("status", "VmHWM:") << 10
    }

    /// Whether the process sleeps in a stop.
    pub(crate) fn is_stopped(&self) -> bool {
        self.proc("status").lines().any(|line| line.starts_with("State:") && line.contains('T'))
    }

    /// Whether the process has the file open and holds the last of QEMU's locks on it (byte 203: "I do not share resizing").
    pub(crate) fn has_locked(&self, path: &Path) -> bool {
        let Ok(path) = path.canonicalize() else { return false };
        let id = self.child.as_ref().unwrap().id();
        let Ok(open) = fs::read_dir(format!("/proc/{id}/fd")) else { return false };
        open.flatten().any(|entry| {
            let locks = self.proc(&format!("fdinfo/{}", entry.file_name().display()));
            fs::read_link(entry.path()).is_ok_and(|target| target == path)
                && locks.lines().any(|line| line.starts_with("lock:") && line.ends_with(" 203 203"))
        })
    }

    /// Polls until the condition holds (true) or the process has ended (false).
    #[track_caller]
    pub(crate) fn until(&mut self, mut holds: impl FnMut(&Self) -> bool) -> bool {
        let begun = Instant::now();
        loop {
            if holds(self) {
                return true;
            }
            if self.child().try_wait().unwrap().is_some() {
                return false;
            }
            assert!(begun.elapsed() < DEADLINE, "waited too long for {}", self.line);
            sleep(Duration::from_micros(200));
        }
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&mut self, name: &str) {
        let command = format!("kill -{name} {}", self.child().id());
        Command::new("sh").args(["-c", &command]).stderr(Stdio::null()).status().unwrap();
    }

    /// Stops the process at the first moment at which the condition holds.
    #[track_caller]
    pub(crate) fn stop_when(&mut self, holds: impl FnMut(&Self) -> bool) {
        if self.stops_when(holds) {
            return;
        }
        let mut gone = Self { child: self.child.take(), line: self.line.clone() };
        gone.child().kill().unwrap();
        panic!("it has ended too early to be stopped: {}", gone.finish().told());
    }

    /// The same; `false` where the process has ended before.
    #[track_caller]
    pub(crate) fn stops_when(&mut self, holds: impl FnMut(&Self) -> bool) -> bool {
        self.until(holds) && {
            self.signal("STOP");
            self.until(Self::is_stopped)
        }
    }

    /// Waits for the end, with standard input closed.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Ran {
        drop(self.child().stdin.take());
        // The output of these programs fits into a pipe, so that they can end before it is read.
        self.until(|_| false);
        Ran::new(self.line.clone(), &self.child.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the program under test and fails if it does not end in time: for inputs that a careless program waits on for ever.
#[track_caller]
pub(crate) fn in_time<I: IntoIterator<Item = OsString>>(args: I) -> Ran {
    Running::dedup_img(args).finish()
}

/// A command for the program under test without root's privilege to pass over file permissions.
pub(crate) fn unprivileged<I: IntoIterator<Item = OsString>>(args: I) -> Command {
    let command = dedup_command(args);
    if !is_root() {
        return command;
    }
    let rights = "-dac_override,-dac_read_search";
    let mut wrapped = Command::new("setpriv");
    wrapped.args([&format!("--bounding-set={rights}"), &format!("--inh-caps={rights}")]);
    wrapped.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null()).env("LC_ALL", "C");
    wrapped
}

/// Whether this user may do everything.
pub(crate) fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}
