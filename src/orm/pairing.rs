//! Which inserted row is which of those that were sent.
//!
//! No database promises an order for what an INSERT of several rows gives back, and all keep that of the rows. So the order is
//! believed unless the values say otherwise: then rows are matched by their values, and where those do not suffice there is no pair at
//! all. A value that the database has changed (rounded, cut, written over by a trigger) agrees with none that was sent, and says nothing.

use std::collections::HashMap;

use super::entity::NewEntity;

/// Rows that disagree with what was sent in their place and are compared with all others.
const LOOKED_AT: usize = 8;

/// The rows in the order of what was sent. None where that cannot be told.
pub(super) fn pair<N: NewEntity>(sent: &[&N], rows: Vec<N::Entity>) -> Option<Vec<N::Entity>> {
    if rows.len() != sent.len() {
        return None;
    }
    let disagree = |new: usize, row: usize| sent[new].disagreements(&rows[row]);
    let elsewhere: Vec<usize> = (0..sent.len()).filter(|&at| disagree(at, at) != 0).collect();
    if elsewhere.is_empty() {
        return Some(rows);
    }
    if sent.iter().all(|new| new.key().is_some()) {
        return by_key(sent, rows);
    }
    let fits_better = |new: usize, row: usize| {
        let (here, there) = (disagree(new, new), disagree(new, row));
        there != here && there & !here == 0
    };
    if !elsewhere.iter().take(LOOKED_AT).any(|&new| elsewhere.iter().any(|&row| row != new && fits_better(new, row))) {
        return Some(rows);
    }
    let mut free = elsewhere.clone();
    let mut places: Vec<usize> = (0..sent.len()).collect();
    for &new in &elsewhere {
        let found = free.iter().position(|&row| disagree(new, row) == 0)?;
        places[new] = free.swap_remove(found);
    }
    let mut rows: Vec<Option<N::Entity>> = rows.into_iter().map(Some).collect();
    places.into_iter().map(|row| rows[row].take()).collect()
}

fn by_key<N: NewEntity>(sent: &[&N], rows: Vec<N::Entity>) -> Option<Vec<N::Entity>> {
    use super::entity::Entity;
    let mut rows: HashMap<_, _> = rows.into_iter().map(|row| (row.id(), row)).collect();
    sent.iter().map(|new| rows.remove(&new.key()?)).collect()
}

#[cfg(test)]
mod tests {
    use std::any::TypeId;

    use proptest::prelude::*;

    use super::super::entity::{Columns, Entity};
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
        const COUNTED: bool = true;
        const ROW_BY_ROW: bool = false;

        fn id(&self) -> u64 {
            self.id
        }

        fn parents() -> Vec<TypeId> {
            Vec::new()
        }

        fn differences(_: &Self, _: &Self) -> Columns {
            0
        }

        fn bump_version(&mut self) {}

        fn refers_anew(_: &Self, _: &Self, _: TypeId) -> bool {
            false
        }

        fn own_parents(&self) -> Vec<u64> {
            Vec::new()
        }

        fn id_of_number(number: u64) -> Option<u64> {
            Some(number)
        }
    }

    struct New(String, i32);

    impl NewEntity for New {
        type Entity = Row;
        const COLUMNS: usize = 2;
        const IN_BATCHES: bool = true;

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

    fn paired(sent: &[New], rows: Vec<Row>) -> Option<Vec<Row>> {
        pair(&sent.iter().collect::<Vec<_>>(), rows)
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
            let paired = paired(&sent, rows).expect("nothing was changed");
            for (new, row) in sent.iter().zip(&paired) {
                prop_assert_eq!(new.disagreements(row), 0);
            }
        }
    }

    #[test]
    fn where_the_database_changes_values_the_order_stands() {
        let sent: Vec<New> = (0..50).map(|size| New("a name".into(), size)).collect();
        let mut rows = inserted(&sent);
        rows.iter_mut().for_each(|row| row.name.make_ascii_uppercase());
        assert_eq!(paired(&sent, rows.clone()), Some(rows));
    }

    #[test]
    fn a_changed_value_that_hides_an_order_is_no_pair() {
        let sent = [New("a".into(), 1), New("b".into(), 2), New("c".into(), 3)];
        let mut rows = inserted(&sent);
        rows.swap(0, 1);
        rows[2].size = 7;
        rows.swap(1, 2);
        assert_eq!(paired(&sent, rows), None);
        let mut fewer = inserted(&sent);
        fewer.pop();
        assert_eq!(paired(&sent, fewer), None);
    }
}
