//! Matches the rows that an INSERT returns to the rows that were sent.
//!
//! No database guarantees the order of the rows that an INSERT returns, but all keep the order in which they were sent.
//! So the order is accepted unless the values contradict it. A value may also differ because the database has changed
//! it (rounded it, trimmed it, replaced it by a trigger). This must not make a valid flush fail: the order is accepted
//! if changed columns explain every difference.

use std::collections::HashMap;

use super::entity::{Columns, Entity, NewEntity};

/// Maximum number of rows that are compared with all other rows to detect another order.
const COMPARED: usize = 64;

/// Returns the rows in the order in which they were sent. `sent` and `rows` have the same length. None if the values
/// contradict the order and do not determine another one.
pub(super) fn match_rows<N: NewEntity>(sent: &[&N], rows: Vec<N::Entity>) -> Option<Vec<N::Entity>> {
    debug_assert_eq!(sent.len(), rows.len());
    // One row needs no matching, even if the database has changed its values.
    if sent.len() <= 1 {
        return Some(rows);
    }
    let disagree = |new: usize, row: usize| sent[new].disagreements(&rows[row]);
    let differing: Vec<(usize, Columns)> =
        (0..sent.len()).map(|index| (index, disagree(index, index))).filter(|(_, columns)| *columns != 0).collect();
    if differing.is_empty() {
        return Some(rows);
    }
    if let Some(indices) = order_by_keys(sent, &rows) {
        return Some(reordered(rows, &indices));
    }
    if !is_contradicted(&differing, disagree) {
        return Some(rows);
    }
    let mut indices: Vec<usize> = (0..sent.len()).collect();
    let (mut free, mut unmatched) = (differing.iter().map(|(index, _)| *index).collect::<Vec<_>>(), Vec::new());
    for &(new, _) in &differing {
        match free.iter().position(|&row| disagree(new, row) == 0) {
            Some(found) => indices[new] = free.swap_remove(found),
            None => unmatched.push(new),
        }
    }
    if unmatched.is_empty() {
        return Some(reordered(rows, &indices));
    }
    // The database has changed values of at least these columns.
    let changed = unmatched.iter().fold(0, |changed, &new| {
        let least = differing.iter().map(|&(row, _)| disagree(new, row)).min_by_key(|columns| {
            // Prefer the row whose differences need the fewest additional changed columns.
            ((columns & !changed).count_ones(), columns.count_ones())
        });
        changed | least.unwrap_or(0)
    });
    if differing.iter().all(|(_, columns)| columns & !changed == 0) {
        return Some(rows);
    }
    let mut free: Vec<usize> = differing.iter().map(|(index, _)| *index).collect();
    for &(new, _) in &differing {
        let fits: Vec<usize> = (0..free.len()).filter(|&index| disagree(new, free[index]) & !changed == 0).collect();
        let (&first, others) = fits.split_first()?;
        // Rows with equal values in all columns are interchangeable.
        if others.iter().any(|&other| N::Entity::differences(&rows[free[first]], &rows[free[other]]) != 0) {
            return None;
        }
        indices[new] = free.swap_remove(first);
    }
    Some(reordered(rows, &indices))
}

/// Whether a sent row agrees better with a returned row at another position.
fn is_contradicted(differing: &[(usize, Columns)], disagree: impl Fn(usize, usize) -> Columns) -> bool {
    differing.iter().take(COMPARED).any(|&(new, here)| {
        differing.iter().any(|&(row, _)| {
            let there = disagree(new, row);
            row != new && there != here && there & !here == 0
        })
    })
}

/// The index of each returned row, if the program has made the keys and the database has stored all of them unchanged.
fn order_by_keys<N: NewEntity>(sent: &[&N], rows: &[N::Entity]) -> Option<Vec<usize>> {
    sent[0].key()?;
    let mut indices: HashMap<_, _> = rows.iter().enumerate().map(|(index, row)| (row.id(), index)).collect();
    sent.iter().map(|new| indices.remove(&new.key()?)).collect()
}

fn reordered<T>(rows: Vec<T>, indices: &[usize]) -> Vec<T> {
    let mut rows: Vec<Option<T>> = rows.into_iter().map(Some).collect();
    indices.iter().filter_map(|&row| rows[row].take()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::entity::{Columns, Entity};
    use super::super::relations::{ForeignKey, Relations};
    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Row {
        id: u64,
        name: String,
        size: i32,
    }

    impl Entity for Row {
        type Id = u64;
        const NAME: &'static str = "Row";
        const VERSIONED: bool = false;
        const ROW_BY_ROW: bool = false;

        fn id(&self) -> u64 {
            self.id
        }

        fn is_auto_increment() -> bool {
            true
        }

        fn parents(_: &mut Relations) {}

        fn differences(old: &Self, new: &Self) -> Columns {
            Columns::from(old.name != new.name) | Columns::from(old.size != new.size) << 1
        }

        fn bytes(&self, _: Columns) -> usize {
            0
        }

        fn bump_version(&mut self) {}

        fn swap_columns(&mut self, _: &mut Self, _: Columns) {}

        fn foreign_keys(&self) -> Vec<ForeignKey> {
            Vec::new()
        }

        fn set_null(&mut self, _: Columns) {}
    }

    struct New(String, i32);

    impl NewEntity for New {
        type Entity = Row;

        fn in_batches() -> bool {
            true
        }

        fn bytes(&self) -> usize {
            0
        }

        fn key(&self) -> Option<u64> {
            None
        }

        fn is_ready(&self) -> bool {
            true
        }

        fn disagreements(&self, row: &Row) -> Columns {
            Columns::from(self.0 != row.name) | Columns::from(self.1 != row.size) << 1
        }
    }

    fn inserted(sent: &[New]) -> Vec<Row> {
        let row = |(id, new): (usize, &New)| Row { id: id as u64, name: new.0.clone(), size: new.1 };
        sent.iter().enumerate().map(row).collect()
    }

    fn matched(sent: &[New], rows: Vec<Row>) -> Option<Vec<Row>> {
        match_rows(&sent.iter().collect::<Vec<_>>(), rows)
    }

    proptest! {
        #[test]
        fn match_rows_assigns_each_row_the_values_that_were_sent_for_it(
            sent in prop::collection::vec(("[ab]{0,2}", 0..3), 0..20),
            order in any::<u64>(),
        ) {
            let sent: Vec<New> = sent.into_iter().map(|(name, size)| New(name, size)).collect();
            let mut rows = inserted(&sent);
            rows.sort_by_key(|row| (row.id + 1).wrapping_mul(order | 1).rotate_left(17));
            let matched = matched(&sent, rows).expect("no value was changed");
            for (new, row) in sent.iter().zip(&matched) {
                prop_assert_eq!(new.disagreements(row), 0);
            }
        }
    }

    #[test]
    fn match_rows_keeps_the_order_if_the_database_changes_a_column() {
        let sent: Vec<New> = (0..50).map(|size| New("a name".into(), size)).collect();
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.name.make_ascii_uppercase());
        assert_eq!(matched(&sent, rows.clone()), Some(rows));
    }

    #[test]
    fn match_rows_finds_another_order_despite_a_changed_value() {
        let sent = [New("a".into(), 1), New("b".into(), 2), New("c".into(), 3)];
        let mut rows = inserted(&sent);
        rows.swap(0, 1);
        rows[2].size = 7;
        rows.swap(1, 2);
        let matched = matched(&sent, rows).expect("the names determine the order");
        assert_eq!(matched.iter().map(|row| row.id).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn match_rows_refuses_another_order_that_changed_values_hide() {
        let sent = [New("a".into(), 1), New("b".into(), 1), New("c".into(), 2), New("d".into(), 2)];
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.name = "x".into());
        rows[1].name = "y".into();
        rows.swap(0, 2);
        assert_eq!(matched(&sent, rows), None);
    }

    #[test]
    fn match_rows_accepts_one_row_with_any_values() {
        let rows = vec![Row { id: 1, name: "another".into(), size: 9 }];
        assert_eq!(matched(&[New("a".into(), 1)], rows.clone()), Some(rows));
    }

    #[test]
    fn match_rows_keeps_the_order_if_all_values_are_incremented() {
        let sent: Vec<New> = (0..20).map(|size| New("a".into(), size)).collect();
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.size += 1);
        assert_eq!(matched(&sent, rows.clone()), Some(rows));
    }
}
