INSERT INTO entries (author, message) VALUES ('Ada', 'one');
-- and another
INSERT INTO entries (author, message) VALUES ('Bob', 'two')
