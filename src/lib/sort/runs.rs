//! Numbers that follow each other, taken together.

use std::ops::Range;

use crate::error::Result;
use crate::units::append;

/// The runs in ascending `numbers`.
pub(crate) fn runs(numbers: impl Iterator<Item = u64>) -> impl Iterator<Item = Range<u64>> {
    let mut numbers = numbers.peekable();
    std::iter::from_fn(move || {
        let first = numbers.next()?;
        let mut end = first + 1;
        while numbers.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(first..end)
    })
}

/// Cuts what `next` tells into up to `count` tasks of `per_task` numbers, each in runs; the last one may have fewer.
pub(crate) fn tasks(
    mut next: impl FnMut() -> Result<Option<u64>>,
    per_task: u64,
    count: usize,
) -> Result<Vec<Vec<Range<u64>>>> {
    let mut tasks = Vec::with_capacity(count);
    let (mut task, mut length) = (Vec::new(), 0);
    while tasks.len() < count
        && let Some(number) = next()?
    {
        append(&mut task, number..number + 1);
        length += 1;
        if length == per_task {
            tasks.push(std::mem::take(&mut task));
            length = 0;
        }
    }
    if !task.is_empty() {
        tasks.push(task);
    }
    Ok(tasks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_a_number_is_missing_and_tasks_where_they_are_full() {
        let numbers = [3, 4, 5, 9, 11, 12];
        assert_eq!(runs(numbers.into_iter()).collect::<Vec<_>>(), [3..6, 9..10, 11..13]);
        let mut left = numbers.into_iter();
        let mut next = || Ok(left.next());
        let mut lengths = |per_task, count| {
            let cut = tasks(&mut next, per_task, count).unwrap();
            cut.iter().map(|task| task.iter().map(|run| run.end - run.start).collect()).collect::<Vec<Vec<u64>>>()
        };
        assert_eq!(lengths(2, 2), [vec![2], vec![1, 1]]);
        assert_eq!(lengths(4, 9), [[2]]);
        assert!(lengths(4, 9).is_empty());
    }
}
