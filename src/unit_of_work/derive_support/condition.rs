//! Conditions on keys that Diesel has no expressions for.

use std::any::type_name;

use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::query_builder::QueryFragment;
use diesel::query_source::Column;
use diesel::sql_types::{Bool, SqlType};

use super::sql::Sql;

/// `column = value` for a text key.
///
/// PostgreSQL returns a `CHAR(n)` with its trailing blanks, and compares it with a text parameter without them. So a
/// value with trailing blanks also matches a column that equals the trimmed value and is longer: such a column has
/// trailing blanks and is a `CHAR(n)`. `schema` is the prefix of the database's own functions.
pub fn text_key<'a, DB, C>(column: C, value: &'a str, schema: &'static str) -> Sql<'a, DB, Bool>
where
    DB: Backend,
    C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + Copy + 'a,
    &'a str: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
{
    let trimmed = value.trim_end_matches(' ');
    let sql = Sql::new().text("(").part(column).text(" = ").part(value.as_expression());
    if trimmed.len() == value.len() {
        return sql.text(")");
    }
    sql.text(" OR (")
        .part(column)
        .text(" = ")
        .part(trimmed.as_expression())
        .text(format!(" AND {schema}octet_length("))
        .part(column)
        .text(format!(") > {schema}octet_length("))
        .part(trimmed.as_expression())
        .text(")))")
}

/// Whether a text has trailing blanks, which PostgreSQL ignores in a `CHAR(n)`.
pub fn ends_in_blanks(text: &str) -> bool {
    text.ends_with(' ')
}

/// `column = value`, with the value rounded to `digits` fractional digits of a second.
pub fn rounded_key<'a, DB, C, V>(column: C, value: V, digits: u8) -> Sql<'a, DB, Bool>
where
    DB: Backend,
    C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
    V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
{
    let sql = Sql::new().text("(").part(column);
    match rounded_type::<C::SqlType>() {
        Some(rounded) => sql.text(" = CAST(").part(value.as_expression()).text(format!(" AS {rounded}({digits})))")),
        None => sql.text(" = ").part(value.as_expression()).text(")"),
    }
}

/// The SQL type to which a value of type `ST` is cast to round it. None if the type has no time of day.
fn rounded_type<ST>() -> Option<&'static str> {
    match type_name::<ST>().strip_prefix("diesel::")?.rsplit("::").next()? {
        "Timestamp" | "Datetime" => Some("DATETIME"),
        "Time" => Some("TIME"),
        _ => None,
    }
}

/// Whether the values of a column have a time of day, which the database may round.
pub fn has_time_of_day<C: Column>(_: C) -> bool {
    rounded_type::<C::SqlType>().is_some()
}

/// Whether a column is an integer, which can be an AUTO_INCREMENT.
pub fn is_integer<C: Column>(_: C) -> bool {
    let name = type_name::<C::SqlType>();
    let last = name.trim_end_matches('>').rsplit("::").next();
    name.starts_with("diesel::")
        && !name.contains("Nullable<")
        && last.is_some_and(|last| ["SmallInt", "Integer", "BigInt", "TinyInt"].contains(&last))
}

/// `column IN (..)` for AUTO_INCREMENT numbers.
pub fn auto_increment_keys<'a, DB, C>(column: C, numbers: &[u64]) -> Sql<'a, DB, Bool>
where
    DB: Backend,
    C: Column + QueryFragment<DB> + 'a,
{
    let numbers: Vec<String> = numbers.iter().map(u64::to_string).collect();
    Sql::uncached().text("(").part(column).text(format!(" IN ({}))", numbers.join(", ")))
}
