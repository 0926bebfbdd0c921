//! Statistics, for people or for programs.

mod human;
mod map;
mod table;

use std::fmt;

use dedup_img::name::shown;
use dedup_img::stats::StatsReport;
use serde::Serialize;

use super::summary::{SCHEMA_VERSION, peak_memory, pretty};
use crate::cli::OutputArg;

/// A gate and whether it is met.
#[derive(Debug, Serialize)]
pub(crate) struct Gate {
    gate: &'static str,
    filename: String,
    limit_percent: f64,
    percent: f64,
    pub(crate) met: bool,
}

impl Gate {
    pub(crate) fn max_duplicate(filename: &str, limit: f64, percent: f64) -> Self {
        let met = percent <= limit;
        Self { gate: "max-duplicate", filename: filename.to_owned(), limit_percent: limit, percent, met }
    }

    pub(crate) fn min_saved(filename: &str, limit: f64, percent: f64) -> Self {
        let met = percent >= limit;
        Self { gate: "min-saved", filename: filename.to_owned(), limit_percent: limit, percent, met }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit_percent, percent, .. } = self;
        let filename = shown(&self.filename);
        // As many digits as it takes to tell the two apart.
        let digits = (1..=6).find(|&digits| format!("{percent:.digits$}") != format!("{limit_percent:.digits$}"));
        let digits = digits.unwrap_or(6);
        match self.gate {
            "max-duplicate" => write!(
                f,
                "'{filename}': {percent:.digits$} % of the data is still stored more than once; --max-duplicate allows {limit_percent} %"
            ),
            _ => write!(
                f,
                "'{filename}': sharing saves {percent:.digits$} % of the data; --min-saved asks for {limit_percent} %"
            ),
        }
    }
}

#[derive(Serialize)]
struct Summary<'a> {
    schema_version: u32,
    #[serde(flatten)]
    report: &'a StatsReport,
    #[serde(skip_serializing_if = "<[Gate]>::is_empty")]
    gates: &'a [Gate],
    peak_memory_bytes: u64,
}

/// The figures.
pub(crate) fn summary(report: &StatsReport, gates: &[Gate], output: OutputArg) -> String {
    match output {
        OutputArg::Human => human::summary(report),
        OutputArg::Json => {
            pretty(&Summary { schema_version: SCHEMA_VERSION, report, gates, peak_memory_bytes: peak_memory() })
        }
    }
}
