//! Ctrl-C and its relatives: stop, clean up, then die of the signal as a shell expects.

use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use dedup_img::Cancel;
use signal_hook::consts::{SIGABRT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;
use signal_hook::low_level::{emulate_default_handler, signal_name};

/// The last signal that asked to stop; 0 for none.
static RECEIVED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);
/// Whether somebody asks by SIGUSR1 how far it is.
static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Watches for signals that ask the program to stop: the first raises what is returned, a second one ends the program at once.
///
/// One that the caller ignores (`nohup`, `trap '' INT`) stays ignored: a handler would override what the caller has decided.
pub(crate) fn watch() -> Cancel {
    let stop = Arc::new(AtomicBool::new(false));
    let ignored = Ignored::by_caller();
    for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| !ignored.has(signal)) {
        // Where a handler cannot be set the signal ends the program at once, which leaves nothing behind either.
        let _ = match is_init() {
            true => flag::register_conditional_shutdown(signal, status(signal), Arc::clone(&stop)),
            false => flag::register_conditional_default(signal, Arc::clone(&stop)),
        };
        // In this order: who sees that it is to stop knows by which signal, whichever thread the handler runs on.
        let _ = flag::register_usize(signal, Arc::clone(&RECEIVED), signal.unsigned_abs() as usize);
        let _ = flag::register(signal, Arc::clone(&stop));
    }
    Cancel::from_flag(stop)
}

/// Makes of a file that may not grow (`ulimit -f`) the failure of a write, with its line, as it is with qemu-img: by default the
/// signal that comes with it ends the program. A handler is not inherited by what the program starts, unlike ignoring it.
pub(crate) fn survive_limits() {
    if !Ignored::by_caller().has(SIGXFSZ) {
        let _ = flag::register(SIGXFSZ, Arc::default());
    }
}

/// Lets SIGUSR1 ask how far the operation is, as with qemu-img; by default it would end the program.
pub(crate) fn answer() {
    if !Ignored::by_caller().has(SIGUSR1) {
        let _ = flag::register(SIGUSR1, Arc::clone(&ASKED));
    }
}

/// Whether somebody has asked since this was called last.
pub(crate) fn asked() -> bool {
    // Most of the time nobody has, and a load costs less.
    ASKED.load(Ordering::Relaxed) && ASKED.swap(false, Ordering::Relaxed)
}

/// The name of the signal that asked to stop, if one did.
pub(crate) fn name() -> Option<&'static str> {
    received().map(|signal| signal_name(signal).unwrap_or("a signal"))
}

/// Makes a small allocation that fails, which aborts after a line that says so, end the program with exit code 1: to a script this
/// is a failure as others, and no crash. (Large ones are errors of the library.)
pub(crate) fn end_without_memory() {
    if !Ignored::by_caller().has(SIGABRT) {
        // Where a handler cannot be set it ends by the signal.
        let _ = flag::register_conditional_shutdown(SIGABRT, 1, Arc::new(AtomicBool::new(true)));
    }
}

/// Ends the program by the signal that was received, if any. So a shell's loop ends too, as one asks with Ctrl-C.
pub(crate) fn die() {
    let Some(signal) = received() else { return };
    if !is_init() {
        let _ = emulate_default_handler(signal);
    }
    process::exit(status(signal));
}

fn received() -> Option<i32> {
    i32::try_from(RECEIVED.load(Ordering::Relaxed)).ok().filter(|&signal| signal != 0)
}

/// Whether this is the first process of a container. The kernel keeps signals from it that it has no handler for, so that it cannot
/// die of one: it ends with the code that a shell would show.
fn is_init() -> bool {
    process::id() == 1
}

/// What a shell shows of a program that died of `signal`.
fn status(signal: i32) -> i32 {
    128 + signal
}

/// The signals that are ignored when the program starts, or by a handler of none since.
///
/// Asking the kernel by sigaction needs unsafe code, which this project forbids; /proc says the same. Where there is no /proc
/// nothing is taken for ignored.
struct Ignored(u64);

impl Ignored {
    fn by_caller() -> Self {
        Self::of(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    /// What `/proc/PID/status` says.
    fn of(status: &str) -> Self {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        Self(mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0))
    }

    fn has(&self, signal: i32) -> bool {
        let bit = signal.checked_sub(1).and_then(|bit| u32::try_from(bit).ok());
        bit.and_then(|bit| self.0.checked_shr(bit)).is_some_and(|mask| mask & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_as_the_kernel_writes_them() {
        let ignored = Ignored::of("Name:\tx\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000001003\nSigCgt:\t0\n");
        assert!([1, 2, 13].into_iter().all(|signal| ignored.has(signal)));
        assert!([0, -1, 3, 15, 64, 65].into_iter().all(|signal| !ignored.has(signal)));
        assert!(!Ignored::of("").has(SIGHUP));
    }
}
