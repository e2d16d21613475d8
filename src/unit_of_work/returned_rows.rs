//! Matches the rows that an INSERT gives back to the rows that were sent.
//!
//! No database promises an order for what an INSERT of several rows gives back, and all keep the order of the rows. So the order is
//! believed unless the values contradict it. A value may also be another because the database has changed it (rounded, trimmed,
//! written over by a trigger), which must not make a valid flush fail: the order stands if changed columns explain every difference.

use std::collections::HashMap;

use super::entity::{Columns, Entity, NewEntity};

/// Of the rows that disagree in the same columns, so many are compared with all others.
const COMPARED: usize = 8;

/// Of all rows that disagree, so many are compared with all others.
const COMPARED_IN_ALL: usize = 64;

/// The returned rows in the order of what was sent. The number of both is the same. None if the values say that the order is
/// another and do not tell which.
pub(super) fn match_rows<N: NewEntity>(sent: &[&N], rows: Vec<N::Entity>) -> Option<Vec<N::Entity>> {
    debug_assert_eq!(sent.len(), rows.len());
    // One row needs no pairing, whatever the database has made of its values.
    if sent.len() <= 1 {
        return Some(rows);
    }
    let disagree = |new: usize, row: usize| sent[new].disagreements(&rows[row]);
    let elsewhere: Vec<(usize, Columns)> =
        (0..sent.len()).map(|at| (at, disagree(at, at))).filter(|(_, columns)| *columns != 0).collect();
    if elsewhere.is_empty() {
        return Some(rows);
    }
    if let Some(indices) = by_key(sent, &rows) {
        return Some(arranged(rows, &indices));
    }
    if !is_contradicted(&elsewhere, disagree) {
        return Some(rows);
    }
    let mut indices: Vec<usize> = (0..sent.len()).collect();
    let (mut free, mut unmatched) = (elsewhere.iter().map(|(at, _)| *at).collect::<Vec<_>>(), Vec::new());
    for &(new, _) in &elsewhere {
        match free.iter().position(|&row| disagree(new, row) == 0) {
            Some(found) => indices[new] = free.swap_remove(found),
            None => unmatched.push(new),
        }
    }
    if unmatched.is_empty() {
        return Some(arranged(rows, &indices));
    }
    // The database has changed values in at least these columns.
    let changed = unmatched.iter().fold(0, |changed, &new| {
        let least = elsewhere.iter().map(|&(row, _)| disagree(new, row)).min_by_key(|columns| {
            // A column that is known to be changed explains more than another.
            ((columns & !changed).count_ones(), columns.count_ones())
        });
        changed | least.unwrap_or(0)
    });
    if elsewhere.iter().all(|(_, columns)| columns & !changed == 0) {
        return Some(rows);
    }
    let mut free: Vec<usize> = elsewhere.iter().map(|(at, _)| *at).collect();
    for &(new, _) in &elsewhere {
        let fits: Vec<usize> = (0..free.len()).filter(|&at| disagree(new, free[at]) & !changed == 0).collect();
        let (&first, others) = fits.split_first()?;
        // Rows that are equal in all columns can be given to either.
        if others.iter().any(|&other| N::Entity::differences(&rows[free[first]], &rows[free[other]]) != 0) {
            return None;
        }
        indices[new] = free.swap_remove(first);
    }
    Some(arranged(rows, &indices))
}

/// Whether a row agrees better with what was sent in another row's place.
fn is_contradicted(elsewhere: &[(usize, Columns)], disagree: impl Fn(usize, usize) -> Columns) -> bool {
    let mut compared: HashMap<Columns, usize> = HashMap::new();
    let looked_at = elsewhere.iter().filter(|(_, columns)| {
        let compared = compared.entry(*columns).or_default();
        *compared += 1;
        *compared <= COMPARED
    });
    looked_at.take(COMPARED_IN_ALL).any(|&(new, here)| {
        elsewhere.iter().any(|&(row, _)| {
            let there = disagree(new, row);
            row != new && there != here && there & !here == 0
        })
    })
}

/// The place of each row, if the program has made the keys and the database has kept all of them.
fn by_key<N: NewEntity>(sent: &[&N], rows: &[N::Entity]) -> Option<Vec<usize>> {
    sent[0].key()?;
    let mut indices: HashMap<_, _> = rows.iter().enumerate().map(|(index, row)| (row.id(), index)).collect();
    sent.iter().map(|new| indices.remove(&new.key()?)).collect()
}

fn arranged<T>(rows: Vec<T>, indices: &[usize]) -> Vec<T> {
    let mut rows: Vec<Option<T>> = rows.into_iter().map(Some).collect();
    indices.iter().filter_map(|&row| rows[row].take()).collect()
}

#[cfg(test)]
mod tests {
    use std::any::TypeId;

    use proptest::prelude::*;

    use super::super::entity::{Columns, Entity};
    use super::super::relations::{Move, Reference, Relations};
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

        fn references(&self) -> Vec<Reference> {
            Vec::new()
        }

        fn moves(_: &Self, _: &Self) -> Vec<Move> {
            Vec::new()
        }

        fn unlink(&mut self, _: &[TypeId]) {}

        fn take_references(&mut self, _: &Self) {}
    }

    struct New(String, i32);

    impl NewEntity for New {
        type Entity = Row;
        const COLUMNS: usize = 2;

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
        fn every_row_gets_values_that_were_sent_for_it(
            sent in prop::collection::vec(("[ab]{0,2}", 0..3), 0..20),
            order in any::<u64>(),
        ) {
            let sent: Vec<New> = sent.into_iter().map(|(name, size)| New(name, size)).collect();
            let mut rows = inserted(&sent);
            // Some permutation.
            rows.sort_by_key(|row| (row.id + 1).wrapping_mul(order | 1).rotate_left(17));
            let matched = matched(&sent, rows).expect("nothing was changed");
            for (new, row) in sent.iter().zip(&matched) {
                prop_assert_eq!(new.disagreements(row), 0);
            }
        }
    }

    #[test]
    fn where_the_database_changes_values_the_order_stands() {
        let sent: Vec<New> = (0..50).map(|size| New("a name".into(), size)).collect();
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.name.make_ascii_uppercase());
        assert_eq!(matched(&sent, rows.clone()), Some(rows));
    }

    #[test]
    fn a_changed_value_does_not_hide_an_order() {
        let sent = [New("a".into(), 1), New("b".into(), 2), New("c".into(), 3)];
        let mut rows = inserted(&sent);
        rows.swap(0, 1);
        rows[2].size = 7;
        rows.swap(1, 2);
        let matched = matched(&sent, rows).expect("the names tell");
        assert_eq!(matched.iter().map(|row| row.id).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn rows_of_another_order_whose_values_were_changed_are_no_pair() {
        let sent = [New("a".into(), 1), New("b".into(), 1), New("c".into(), 2), New("d".into(), 2)];
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.name = "x".into());
        rows[1].name = "y".into();
        rows.swap(0, 2);
        assert_eq!(matched(&sent, rows), None);
    }

    #[test]
    fn one_row_needs_no_pairing() {
        let rows = vec![Row { id: 1, name: "another".into(), size: 9 }];
        assert_eq!(matched(&[New("a".into(), 1)], rows.clone()), Some(rows));
    }

    #[test]
    fn values_that_are_all_counted_up_keep_the_order() {
        let sent: Vec<New> = (0..20).map(|size| New("a".into(), size)).collect();
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.size += 1);
        assert_eq!(matched(&sent, rows.clone()), Some(rows));
    }
}
