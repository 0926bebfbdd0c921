//! Ctrl-C and its relatives: stop, clean up, then die of the signal as a shell expects.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use dedup_img::cancel::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// The last such signal that came; 0 for none.
static RECEIVED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Watches for signals that ask the program to stop: the first raises what is returned, a second one ends the program at once.
pub(crate) fn watch() -> Cancel {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // Where a handler cannot be set the signal ends the program at once, which leaves nothing behind either.
        let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&flag));
        let _ = signal_hook::flag::register(signal, Arc::clone(&flag));
        let _ = signal_hook::flag::register_usize(signal, Arc::clone(&RECEIVED), signal.unsigned_abs() as usize);
    }
    Cancel::from_flag(flag)
}

/// Ends the program by the signal that was received, if any. So a shell's loop ends too, as one asks with Ctrl-C.
pub(crate) fn die() {
    let signal = i32::try_from(RECEIVED.load(Ordering::Relaxed)).unwrap_or(0);
    if signal != 0 {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
}
