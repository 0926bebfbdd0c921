//! `dedup-img gc`.

use dedup_img::{GcOptions, GcPlan, Less};

use super::in_place::{InPlace, repaired, run_in_place, unready};
use crate::cli::GcArgs;
use crate::failure::Failure;
use crate::view;

/// Runs the command.
pub(crate) fn run(args: &GcArgs) -> Result<(), Failure> {
    let Some(file) = args.file.as_deref() else {
        return Err(Failure::Usage { command: "gc", message: "Expecting one image file name".to_owned() });
    };
    let common = InPlace {
        command: "gc",
        file,
        format: args.format.as_deref(),
        dry_run: args.dry_run,
        // What moves is read in any case.
        ignore_holes: false,
        memory: args.tables.memory,
        run: &args.run,
    };
    run_in_place(&common, |storage, work| {
        let options = GcOptions { compact: args.compact, drop_pool: args.drop_pool };
        let no_room = |e| view::room::no_room(e, less(options));
        let plan = GcPlan::new(storage, options, work)?;
        let report = if args.dry_run {
            unready(&common, plan.is_unready(work)?);
            plan.report(work)?
        } else {
            let plan = plan.made_ready(work, |done| repaired(&common, done))?;
            plan.apply(work).map_err(no_room)?
        };
        Ok(view::gc::summary(file, &report, options, args.dry_run, args.run.output))
    })
}

/// What would need less room.
fn less(options: GcOptions) -> Less {
    match options {
        GcOptions { compact: true, .. } => Less::NotCompact,
        GcOptions { drop_pool: false, .. } => Less::DropPool,
        GcOptions { .. } => Less::Nothing,
    }
}
