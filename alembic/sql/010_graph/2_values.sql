-- Revision 010: texts and JSON values as the package accepts them. The functions are inlined, so none has a setting.

-- == create functions that check texts and JSON
-- Blanks are those of Unicode's White_Space and the four separators U+001C to U+001F, as Python's str.strip has them.
CREATE OR REPLACE FUNCTION circle.trimmed(p_text text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT btrim(p_text, U&' \0009\000A\000B\000C\000D\001C\001D\001E\001F\0085\00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\2028\2029\202F\205F\3000')
$$;
-- The label that a condition of an edge or an outcome stands for; '' is none. Lower case of A to Z only, so that it is the same in every
-- database and in Python.
CREATE OR REPLACE FUNCTION circle.branch_label(p_text text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT lower(circle.trimmed(p_text) COLLATE "C")
$$;
-- Whether a text certainly begins with a character that is no blank; ascii() returns the code point.
CREATE OR REPLACE FUNCTION circle.begins_well(p_text text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT ascii(p_text) BETWEEN 33 AND 126 OR ascii(p_text) BETWEEN 161 AND 5759 OR ascii(p_text) >= 12289
$$;
-- Whether all ids certainly have neither leading nor trailing blanks and are not empty; false is no proof of the contrary.
CREATE OR REPLACE FUNCTION circle.surely_trimmed(p_ids text[]) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT array_to_string(p_ids, E'\n') COLLATE "C" !~ ('(^|\n)([^!-~\u00A1-\u167F\u3001-\U0010FFFF]|$)'
                                                         '|[^!-~\u00A1-\u167F\u3001-\U0010FFFF](\n|$)')
$$;
-- JSON that Python can't read: more than 64 levels, or a number out of the range of floats. jsonb_path_match ignores values that
-- are no numbers; both functions return NULL for NULL.
CREATE OR REPLACE FUNCTION circle.nested_too_deep(p_json jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_path_exists(p_json, 'strict $.**{64 to last} ? (@.type() == "object" || @.type() == "array")')
$$;
CREATE OR REPLACE FUNCTION circle.number_too_large(p_json jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_path_match(p_json, '$[*].** > 1.7976931348623157e308 || $[*].** < -1.7976931348623157e308')
$$;
