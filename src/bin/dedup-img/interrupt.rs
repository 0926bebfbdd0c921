//! Ctrl-C and its relatives: stop, clean up, then die of the signal as a shell expects.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dedup_img::cancel::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Watches for signals that ask the program to stop.
pub(crate) struct Interrupt {
    received: Arc<AtomicUsize>,
    /// Raised by the first of them; a second one ends the program at once.
    pub(crate) cancel: Cancel,
}

impl Interrupt {
    /// Starts watching.
    pub(crate) fn watch() -> Self {
        let (flag, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // Where a handler cannot be set the signal ends the program at once, which leaves nothing behind either.
            let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&flag));
            let _ = signal_hook::flag::register(signal, Arc::clone(&flag));
            let _ = signal_hook::flag::register_usize(signal, Arc::clone(&received), signal.unsigned_abs() as usize);
        }
        Self { received, cancel: Cancel::from_flag(flag) }
    }

    /// Ends the program by the signal that was received, if any.
    pub(crate) fn die(&self) {
        let signal = i32::try_from(self.received.load(Ordering::Relaxed)).unwrap_or(0);
        if signal != 0 {
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    }
}
