//! Comparing what a program says with what is due.

use serde_json::Value;

/// Fails with every figure that differs. `"*"` stands for whatever there is.
#[track_caller]
pub(crate) fn assert_figures(found: &Value, due: &Value, what: &str) {
    let mut differences = Vec::new();
    compare(found, due, "", &mut differences);
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}

fn compare(found: &Value, due: &Value, at: &str, differences: &mut Vec<String>) {
    match (found, due) {
        (_, Value::String(any)) if any == "*" => {}
        (Value::Object(found), Value::Object(due)) => {
            for key in found.keys().filter(|key| !due.contains_key(*key)) {
                differences.push(format!("{at}.{key}: {}, which is not due", found[key]));
            }
            for (key, due) in due {
                match found.get(key) {
                    Some(found) => compare(found, due, &format!("{at}.{key}"), differences),
                    None => differences.push(format!("{at}.{key}: missing, due is {due}")),
                }
            }
        }
        (Value::Array(found), Value::Array(due)) => {
            if found.len() != due.len() {
                differences.push(format!("{at}: {} entries, due are {}", found.len(), due.len()));
            }
            for (n, (found, due)) in found.iter().zip(due).enumerate() {
                compare(found, due, &format!("{at}[{n}]"), differences);
            }
        }
        (Value::Number(one), Value::Number(other)) if one.is_f64() || other.is_f64() => {
            // Two ways to divide and multiply may end in different last digits.
            let (one, other) = (one.as_f64().unwrap(), other.as_f64().unwrap());
            if (one - other).abs() > 1e-9 * other.abs().max(1.0) {
                differences.push(format!("{at}: {one}, due is {other}"));
            }
        }
        _ if found == due => {}
        _ => differences.push(format!("{at}: {found}, due is {due}")),
    }
}
