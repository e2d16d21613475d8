//! Conditions on keys that Diesel has no expressions for.

use std::any::type_name;
use std::fmt;

use diesel::backend::Backend;
use diesel::expression::{AppearsOnTable, AsExpression, Expression, TypedExpressionType, ValidGrouping, is_aggregate};
use diesel::query_builder::{AstPass, QueryFragment, QueryId};
use diesel::query_source::Column;
use diesel::result::QueryResult;
use diesel::sql_types::{Bool, SqlType};

/// `column = value` for a text key.
///
/// PostgreSQL returns a `CHAR(n)` with its trailing blanks, and compares it with a text parameter without them. So a
/// value with trailing blanks also matches a column that equals the trimmed value and is longer: such a column has
/// trailing blanks and is a `CHAR(n)`.
#[doc(hidden)]
pub struct TextKey<C, V, W> {
    column: C,
    value: V,
    trimmed: Option<W>,
    /// The schema prefix of PostgreSQL's own functions. Empty if the database is not known to be PostgreSQL.
    schema: &'static str,
}

/// A value as an expression of the SQL type of a column.
type Bound<V, C> = <V as AsExpression<<C as Expression>::SqlType>>::Expression;

#[doc(hidden)]
pub fn text_key<'a, C>(
    column: C,
    value: &'a String,
    is_postgres: bool,
) -> TextKey<C, Bound<&'a String, C>, Bound<String, C>>
where
    C: Column<SqlType: SqlType + TypedExpressionType>,
    &'a String: AsExpression<C::SqlType>,
    String: AsExpression<C::SqlType>,
{
    let trimmed = value.trim_end_matches(' ');
    let trimmed = (trimmed.len() < value.len()).then(|| trimmed.to_owned().as_expression());
    let schema = if is_postgres { "pg_catalog." } else { "" };
    TextKey { column, value: value.as_expression(), trimmed, schema }
}

/// Whether a text has trailing blanks, which PostgreSQL ignores in a `CHAR(n)`.
#[doc(hidden)]
pub fn ends_in_blanks(text: &str) -> bool {
    text.ends_with(' ')
}

/// `column = value`, with the value rounded to `digits` fractional digits of a second.
#[doc(hidden)]
pub struct RoundedKey<C, V> {
    column: C,
    value: V,
    digits: u8,
}

#[doc(hidden)]
pub fn rounded_key<C, V>(column: C, value: V, digits: u8) -> RoundedKey<C, V::Expression>
where
    C: Column<SqlType: SqlType + TypedExpressionType>,
    V: AsExpression<C::SqlType>,
{
    RoundedKey { column, value: value.as_expression(), digits }
}

/// The SQL type to which a value of type `ST` is cast to round it. None if the type has no time of day.
fn rounded_type<ST>() -> Option<&'static str> {
    let name = type_name::<ST>();
    match name.rsplit("::").next()? {
        "Timestamp" | "Datetime" if name.starts_with("diesel::") => Some("DATETIME"),
        "Time" if name.starts_with("diesel::") => Some("TIME"),
        _ => None,
    }
}

/// Whether the values of a column have a time of day, which the database may round.
#[doc(hidden)]
pub fn has_time_of_day<C: Column>(_: C) -> bool {
    rounded_type::<C::SqlType>().is_some()
}

/// Whether a column is an integer, which can be an AUTO_INCREMENT.
#[doc(hidden)]
pub fn is_integer<C: Column>(_: C) -> bool {
    let name = type_name::<C::SqlType>();
    ["SmallInt", "Integer", "BigInt", "TinyInt"]
        .iter()
        .any(|integer| name.starts_with("diesel::") && name.trim_end_matches('>').rsplit("::").next() == Some(integer))
        && !name.contains("Nullable<")
}

/// `column IN (..)` for AUTO_INCREMENT numbers.
#[doc(hidden)]
pub struct AutoIncrementKeys<'n, C> {
    column: C,
    numbers: &'n [u64],
}

#[doc(hidden)]
pub fn auto_increment_keys<C: Column>(column: C, numbers: &[u64]) -> AutoIncrementKeys<'_, C> {
    AutoIncrementKeys { column, numbers }
}

impl<C, V, W, DB> QueryFragment<DB> for TextKey<C, V, W>
where
    C: QueryFragment<DB>,
    V: QueryFragment<DB>,
    W: QueryFragment<DB>,
    DB: Backend,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.push_sql("(");
        self.column.walk_ast(out.reborrow())?;
        out.push_sql(" = ");
        self.value.walk_ast(out.reborrow())?;
        if let Some(trimmed) = &self.trimmed {
            out.push_sql(" OR (");
            self.column.walk_ast(out.reborrow())?;
            out.push_sql(" = ");
            trimmed.walk_ast(out.reborrow())?;
            out.push_sql(&format!(" AND {}octet_length(", self.schema));
            self.column.walk_ast(out.reborrow())?;
            out.push_sql(&format!(") > {}octet_length(", self.schema));
            trimmed.walk_ast(out.reborrow())?;
            out.push_sql("))");
        }
        out.push_sql(")");
        Ok(())
    }
}

impl<C, V, DB> QueryFragment<DB> for RoundedKey<C, V>
where
    C: Column + QueryFragment<DB>,
    V: QueryFragment<DB>,
    DB: Backend,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        let rounded_type = rounded_type::<C::SqlType>();
        out.push_sql("(");
        self.column.walk_ast(out.reborrow())?;
        out.push_sql(if rounded_type.is_some() { " = CAST(" } else { " = " });
        self.value.walk_ast(out.reborrow())?;
        if let Some(rounded_type) = rounded_type {
            out.push_sql(&format!(" AS {rounded_type}({}))", self.digits));
        }
        out.push_sql(")");
        Ok(())
    }
}

impl<C, DB> QueryFragment<DB> for AutoIncrementKeys<'_, C>
where
    C: QueryFragment<DB>,
    DB: Backend,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        // Every number of rows makes another statement, so the statements are not cached.
        out.unsafe_to_cache_prepared();
        out.push_sql("(");
        self.column.walk_ast(out.reborrow())?;
        for (index, number) in self.numbers.iter().enumerate() {
            out.push_sql(if index == 0 { " IN (" } else { ", " });
            out.push_sql(&number.to_string());
        }
        out.push_sql("))");
        Ok(())
    }
}

macro_rules! conditions {
    ($($condition:ident<$($lifetime:lifetime,)? C $(, $value:ident)*>),+) => { $(
        impl<$($lifetime,)? C $(, $value)*> Expression for $condition<$($lifetime,)? C $(, $value)*> {
            type SqlType = Bool;
        }

        impl<$($lifetime,)? C $(, $value)*> QueryId for $condition<$($lifetime,)? C $(, $value)*> {
            type QueryId = ();
            const HAS_STATIC_QUERY_ID: bool = false;
        }

        impl<$($lifetime,)? C $(, $value)*> ValidGrouping<()> for $condition<$($lifetime,)? C $(, $value)*> {
            type IsAggregate = is_aggregate::No;
        }

        impl<$($lifetime,)? C: AppearsOnTable<Source> $(, $value)*, Source> AppearsOnTable<Source>
            for $condition<$($lifetime,)? C $(, $value)*>
        {
        }

        impl<$($lifetime,)? C $(, $value)*> fmt::Debug for $condition<$($lifetime,)? C $(, $value)*> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($condition))
            }
        }
    )+ };
}

conditions!(TextKey<C, V, W>, RoundedKey<C, V>, AutoIncrementKeys<'n, C>);
