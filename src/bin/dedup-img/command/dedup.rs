//! `dedup-img dedup`.

use dedup_img::inplace::{DedupOptions, Plan};
use dedup_img::pool::Pin;

use super::in_place::{InPlace, made_ready, run_in_place};
use crate::cli::DedupArgs;
use crate::failure::Failure;
use crate::view;

/// What to do where there is no room.
const ADVICE: &str = "free some; dedup-img gc gives back what the image does not use and needs less";

/// Runs the command.
pub(crate) fn run(args: &DedupArgs) -> Result<(), Failure> {
    let Some(file) = args.file.as_deref() else {
        return Err(Failure::Usage { command: "dedup", message: "Expecting one image file name".to_owned() });
    };
    let common = InPlace {
        command: "dedup",
        file,
        format: args.format.as_deref(),
        dry_run: args.dry_run,
        ignore_holes: args.ignore_holes,
        memory: args.tables.memory,
        run: &args.run,
    };
    run_in_place(&common, |storage, work| {
        let options = DedupOptions { pin: args.pin.map_or(Pin::Shared, Pin::from) };
        let mut plan = Plan::new(storage, options, work)?;
        if made_ready(&common, storage, work)? {
            plan = Plan::new(storage, options, work)?;
        }
        if args.dry_run {
            let report = plan.report(storage, work)?;
            return view::dedup::planned(file, &plan, &report, args.run.output);
        }
        Ok(view::dedup::done(
            file,
            &plan.apply(storage, work).map_err(|e| view::room::no_room(e, ADVICE))?,
            args.run.output,
        ))
    })
}
