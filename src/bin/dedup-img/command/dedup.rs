//! `dedup-img dedup`.

use dedup_img::{DedupOptions, DedupPlan, Less, Pin};

use super::in_place::{InPlace, repaired, run_in_place, unready};
use crate::cli::DedupArgs;
use crate::failure::Failure;
use crate::view;

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
        let plan = DedupPlan::new(storage, options, work)?;
        if args.dry_run {
            unready(&common, plan.is_unready(work)?);
            let report = plan.report(work)?;
            return view::dedup::planned(file, &plan, &report, args.run.output);
        }
        let plan = plan.made_ready(work, |done| repaired(&common, done))?;
        let report = plan.apply(work).map_err(|e| view::room::no_room(e, Less::CollectFirst))?;
        Ok(view::dedup::done(file, &report, args.run.output))
    })
}
