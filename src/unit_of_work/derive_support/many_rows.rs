//! One UPDATE of several rows with different values, and the locks of several rows.

use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::query_builder::{AstPass, QueryFragment};
use diesel::query_source::Column;
use diesel::result::QueryResult;
use diesel::sql_types::{Bool, Integer, SqlType};

use super::sql::Sql;

/// A column of a `VALUES` list.
pub struct ListColumn<'a, DB> {
    name: &'static str,
    values: Box<dyn ColumnValues<DB> + 'a>,
}

/// Values are bound with the type of their column, so the list needs no casts.
pub fn list_column<'a, DB, C, V>(_: C, values: impl Iterator<Item = V>) -> ListColumn<'a, DB>
where
    DB: Backend,
    C: Column<SqlType: SqlType + TypedExpressionType>,
    V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
{
    let values: Vec<_> = values.map(AsExpression::as_expression).collect();
    ListColumn { name: C::NAME, values: Box::new(values) }
}

/// The values of one column. The trait hides their type, which differs between columns.
trait ColumnValues<DB: Backend> {
    fn walk<'b>(&'b self, row: usize, out: AstPass<'_, 'b, DB>) -> QueryResult<()>;
}

impl<E: QueryFragment<DB>, DB: Backend> ColumnValues<DB> for Vec<E> {
    fn walk<'b>(&'b self, row: usize, out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        self[row].walk_ast(out)
    }
}

/// `(0, ..), (1, ..)`: the index of each row and its values.
struct ListRows<'a, DB> {
    rows: usize,
    columns: Vec<ListColumn<'a, DB>>,
}

impl<DB: Backend> QueryFragment<DB> for ListRows<'_, DB> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        for row in 0..self.rows {
            out.push_sql(if row == 0 { "(" } else { "), (" });
            out.push_sql(&row.to_string());
            for column in &self.columns {
                out.push_sql(", ");
                column.values.walk(row, out.reborrow())?;
            }
        }
        out.push_sql(")");
        Ok(())
    }
}

/// The name of the common table expression. PostgreSQL refuses the statement if the updated table has the same name.
const ROWS: &str = "diesel_session_rows";

/// The name of the `VALUES` list. Its columns are called `column1`, `column2` and so on; the first one is the index.
const VALUES: &str = "diesel_session_values";

/// `WITH rows AS (SELECT .. FOR NO KEY UPDATE) UPDATE .. FROM rows RETURNING`. The statement returns the index of each
/// row that was found.
///
/// The UPDATE alone would lock the rows in the order of its join, which differs from session to session. Two sessions
/// could then deadlock, whatever the order in which the program writes. `FOR NO KEY UPDATE` is the lock of an UPDATE
/// that changes no key.
///
/// The statement returns indices instead of keys, because the database may spell a key differently than the program.
/// Only the database compares keys here. `version` has the present version of each row.
pub fn update_rows<'a, DB: Backend + 'a, T: QueryFragment<DB> + Copy + 'a>(
    table: T,
    rows: usize,
    keys: Vec<ListColumn<'a, DB>>,
    version: Option<ListColumn<'a, DB>>,
    sets: Vec<ListColumn<'a, DB>>,
) -> Sql<'a, DB, Integer> {
    let key = names(&keys);
    let version_name = version.as_ref().map(|version| version.name);
    let conditions: Vec<&str> = key.iter().copied().chain(version_name).collect();
    let set_names = names(&sets);
    let columns = keys.into_iter().chain(version).chain(sets).collect();
    let mut sql = Sql::uncached().text("WITH ").name(ROWS).text(" AS (SELECT ").name(VALUES).text(".*");
    sql = locked_rows(sql, table, &key, &conditions, ListRows { rows, columns });
    sql = sql.text(" FOR NO KEY UPDATE) UPDATE ").part(table);
    for (index, name) in set_names.into_iter().enumerate() {
        sql = sql.text(if index == 0 { " SET " } else { ", " }).name(name).text(" = ");
        sql = list_value(sql, ROWS, 2 + conditions.len() + index);
    }
    if let Some(version) = version_name {
        sql = sql.text(", ").name(version).text(" = ").part(table).text(".").name(version).text(" + 1");
    }
    sql = join(sql.text(" FROM ").name(ROWS), table, ROWS, &conditions);
    list_value(sql.text(" RETURNING "), ROWS, 1)
}

/// A SELECT that locks rows in the order of their keys.
pub fn lock_rows<'a, DB: Backend + 'a, T: QueryFragment<DB> + Copy + 'a>(
    table: T,
    rows: usize,
    keys: Vec<ListColumn<'a, DB>>,
    for_delete: bool,
) -> Sql<'a, DB, Integer> {
    let key = names(&keys);
    let sql = list_value(Sql::uncached().text("SELECT "), VALUES, 1);
    let sql = locked_rows(sql, table, &key, &key, ListRows { rows, columns: keys });
    sql.text(if for_delete { " FOR UPDATE" } else { " FOR NO KEY UPDATE" })
}

/// A query whether the role may update a column of the table. Without this privilege it may not lock rows.
pub fn may_lock<'a, DB: Backend, T: QueryFragment<DB> + 'a>(table: T) -> Sql<'a, DB, Bool> {
    // The server parses the text as a name, which includes the quotes.
    let sql = Sql::uncached().text("SELECT pg_catalog.has_any_column_privilege($name$");
    sql.part(table).text("$name$, 'UPDATE')")
}

fn names<DB>(columns: &[ListColumn<'_, DB>]) -> Vec<&'static str> {
    columns.iter().map(|column| column.name).collect()
}

/// Adds `FROM table, (VALUES ..) WHERE .. ORDER BY ..`, for a lock of the rows in the order of their keys.
fn locked_rows<'a, DB: Backend + 'a, T: QueryFragment<DB> + Copy + 'a>(
    sql: Sql<'a, DB, Integer>,
    table: T,
    key: &[&'static str],
    conditions: &[&'static str],
    list: ListRows<'a, DB>,
) -> Sql<'a, DB, Integer> {
    let sql = sql.text(" FROM ").part(table).text(", (VALUES ").part(list).text(") AS ").name(VALUES);
    let mut sql = join(sql, table, VALUES, conditions);
    for (index, name) in key.iter().enumerate() {
        sql = sql.text(if index == 0 { " ORDER BY " } else { ", " }).part(table).text(".").name(*name);
    }
    sql
}

/// Adds the conditions that join the table to a list. The columns of the conditions follow the index in the list.
fn join<'a, DB: Backend, T: QueryFragment<DB> + Copy + 'a>(
    mut sql: Sql<'a, DB, Integer>,
    table: T,
    list: &'static str,
    conditions: &[&'static str],
) -> Sql<'a, DB, Integer> {
    for (index, name) in conditions.iter().enumerate() {
        sql = sql.text(if index == 0 { " WHERE " } else { " AND " }).part(table).text(".").name(*name).text(" = ");
        sql = list_value(sql, list, 2 + index);
    }
    sql
}

fn list_value<'a, DB: Backend>(sql: Sql<'a, DB, Integer>, list: &'static str, number: usize) -> Sql<'a, DB, Integer> {
    sql.name(list).text(".").name(format!("column{number}"))
}
